/* The operations of fused.c, which includes this once for each type; NARROW is WIDEN's way back. */

/* output = x / sqrt(mean(x^2) + eps) * weight for rows of `size` numbers; weight is float32 (Zhang & Sennrich 2019) */
void NAMED(antefix_rms_norm)(
    const NUMBER *x, const float *weight, NUMBER *output, int64_t rows, int64_t size, float eps, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size >= ENOUGH)
  for (int64_t row = 0; row < rows; row++) {
    const NUMBER *from = x + row * size;
    NUMBER *to = output + row * size;
    float sum = 0;
    for (int64_t i = 0; i < size; i++) sum += WIDEN(from[i]) * WIDEN(from[i]);
    const float scale = 1 / sqrtf(sum / (float)size + eps);
    for (int64_t i = 0; i < size; i++) to[i] = NARROW(WIDEN(from[i]) * scale * weight[i]);
  }
}

/* output = x cos + rotate_half(x) sin for x [tokens, heads, size], any strides but the last, and cos and sin
 * [tokens, size]; output [tokens, heads, size] (Su et al. 2021, halves as in GPT-NeoX) */
void NAMED(antefix_rotate)(
    const NUMBER *x, int64_t token_step, int64_t head_step, const NUMBER *cosine, const NUMBER *sine, NUMBER *output,
    int64_t tokens, int64_t heads, int64_t size, int64_t threads) {
  const int64_t half = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * size >= ENOUGH)
  for (int64_t token = 0; token < tokens; token++) {
    const NUMBER *c = cosine + token * size, *s = sine + token * size;
    for (int64_t head = 0; head < heads; head++) {
      const NUMBER *from = x + token * token_step + head * head_step;
      NUMBER *restrict to = output + (token * heads + head) * size; /* one loop for each half: else none is vectorized */
      for (int64_t i = 0; i < half; i++)
        to[i] = NARROW(WIDEN(from[i]) * WIDEN(c[i]) - WIDEN(from[half + i]) * WIDEN(s[i]));
      for (int64_t i = half; i < size; i++)
        to[i] = NARROW(WIDEN(from[i]) * WIDEN(c[i]) + WIDEN(from[i - half]) * WIDEN(s[i]));
    }
  }
}
