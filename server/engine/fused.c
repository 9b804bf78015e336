/* What transformers writes out in many kernels, in one pass each, for fused.py. Sums and products are float32. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { ENOUGH = 1 << 14 }; /* numbers that are worth a second thread */

static inline float from_bfloat16(uint16_t x) {
  union { uint32_t i; float f; } wide = {(uint32_t)x << 16};
  return wide.f;
}

/* To the nearest, to the even one of two; NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
  union { float f; uint32_t i; } wide = {x};
  return x != x ? 0x7fc0 : (uint16_t)((wide.i + 0x7fff + (wide.i >> 16 & 1)) >> 16);
}

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
