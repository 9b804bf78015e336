/* Rounding rows to 8-bit integers and scaling their products back, each in one pass, for int8_rows.py. */
#include <math.h>
#include <stdint.h>

#include "bfloat16.h"

enum { LARGEST = 127, ZERO_POINT = 128 };
enum { WORTH_THREADS = 16384 }; /* numbers; fewer are done before a second thread has woken up */
static const float SMALLEST = 1e-20f;
static const uint32_t INFINITE = 0x7f800000, SIGN = 0x80000000;

#define NUMBER float
#define WIDEN(x) (x)
#define NARROW(x) (x)
#define NAMED(f) f##_float32
#include "int8_rows.h"
#undef NUMBER
#undef WIDEN
#undef NARROW
#undef NAMED

#define NUMBER uint16_t
#define WIDEN(x) from_bfloat16(x)
#define NARROW(x) to_bfloat16(x)
#define NAMED(f) f##_bfloat16
#include "int8_rows.h"
