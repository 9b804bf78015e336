/* Rounding rows to 8-bit integers and scaling their products back, each in one pass, for int8_rows.py. */
#include <math.h>
#include <stdint.h>

enum { LARGEST = 127, ZERO_POINT = 128 };
enum { WORTH_THREADS = 16384 }; /* numbers; fewer are done before a second thread has woken up */
static const float SMALLEST = 1e-20f;
static const uint32_t INFINITE = 0x7f800000, SIGN = 0x80000000;

typedef union { float f; uint32_t i; } Bits;

static inline float from_bfloat16(uint16_t x) { return (Bits){.i = (uint32_t)x << 16}.f; }

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
  const uint32_t i = (Bits){.f = x}.i;
  return (i & ~SIGN) > INFINITE ? 0x7fc0 : (i + 0x7fff + (i >> 16 & 1)) >> 16;
}

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
