/* bfloat16, the upper half of a float32, as a 16-bit integer. */
#include <stdint.h>

typedef union { float f; uint32_t i; } Bits;

static inline float from_bfloat16(uint16_t x) { return (Bits){.i = (uint32_t)x << 16}.f; }

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
  const uint32_t i = (Bits){.f = x}.i;
  return (i & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (i + 0x7fff + (i >> 16 & 1)) >> 16;
}
