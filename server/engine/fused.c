/* What transformers writes out in many kernels, in one pass each, for fused.py. Sums and products are float32. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "bfloat16.h"

enum { ENOUGH = 1 << 14 }; /* numbers that are worth a second thread */

#define NUMBER float
#define WIDEN(x) (x)
#define NARROW(x) (x)
#define NAMED(f) f##_float32
#include "fused_rows.h"
#undef NUMBER
#undef WIDEN
#undef NARROW
#undef NAMED

#define NUMBER uint16_t
#define WIDEN(x) from_bfloat16(x)
#define NARROW(x) to_bfloat16(x)
#define NAMED(f) f##_bfloat16
#include "fused_rows.h"
