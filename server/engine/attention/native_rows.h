/* One query row over a run of slots, and the packing of tiles for `native_blocks.h`; native.c includes this once for each type that keys and values may have.
 *
 * NUMBER is the type, WIDEN makes a float of it, NAMED(f) is f's name for the type.
 */
/* scores[h][s] for all heads h and slots s, 0 <= s < count */
static inline __attribute__((always_inline)) void NAMED(score)(
    const Layer *l, const float *query, int64_t lo, int64_t count, float *scores, const int64_t size) {
  const int64_t group = l->query_heads / l->kv_heads, step = l->kv_heads * size;
  for (int64_t s0 = 0; s0 < count; s0 += AT_ONCE) {
    const int64_t some = count - s0 < AT_ONCE ? count - s0 : AT_ONCE;
    for (int64_t h = 0; h < l->query_heads; h++) {
      const float *q = query + h * l->query_head;
      const NUMBER *k = (const NUMBER *)l->keys + (lo + s0) * step + h / group * size;
      for (int64_t s = 0; s < some; s++, k += step) {
        float sum = 0;
        for (int64_t d = 0; d < size; d += LINE / (int64_t)sizeof(NUMBER)) __builtin_prefetch(k + AT_ONCE * step + d);
        for (int64_t d = 0; d < size; d++) sum += q[d] * WIDEN(k[d]);
        scores[h * count + s0 + s] = sum * l->scale;
      }
    }
  }
}

/* output[h] = sum over s of scores[h][s] * value[s] */
static inline __attribute__((always_inline)) void NAMED(gather)(
    const Layer *l, int64_t lo, int64_t count, const float *scores, float *output, const int64_t size) {
  const int64_t group = l->query_heads / l->kv_heads, step = l->kv_heads * size;
  memset(output, 0, sizeof(float) * l->query_heads * size);
  for (int64_t s0 = 0; s0 < count; s0 += AT_ONCE) {
    const int64_t some = count - s0 < AT_ONCE ? count - s0 : AT_ONCE;
    for (int64_t h = 0; h < l->query_heads; h++) {
      const NUMBER *v = (const NUMBER *)l->values + (lo + s0) * step + h / group * size;
      const float *p = scores + h * count + s0;
      float *o = output + h * size;
      for (int64_t s = 0; s < some; s++, v += step) {
        for (int64_t d = 0; d < size; d += LINE / (int64_t)sizeof(NUMBER)) __builtin_prefetch(v + AT_ONCE * step + d);
        for (int64_t d = 0; d < size; d++) o[d] += p[s] * WIDEN(v[d]);
      }
    }
  }
}

static inline __attribute__((always_inline)) void NAMED(attend_sized)(
    const Layer *l, int64_t row, int64_t ahead, int64_t lo, int64_t count, float *scores, float *output, float *lse,
    const int64_t size) {
  NAMED(score)(l, l->query + row * l->query_row, lo, count, scores, size);
  for (int64_t h = 0; h < l->query_heads; h++) {
    float *s = scores + h * count, most = -INFINITY, sum = 0;
    if (l->softcap > 0)
      for (int64_t i = 0; i < count; i++) s[i] = l->softcap * tanhf(s[i] / l->softcap);
    if (l->bias) add_bias(l, h, ahead, count, s, 1);
    for (int64_t i = 0; i < count; i++) most = s[i] > most ? s[i] : most;
    for (int64_t i = 0; i < count; i++) sum += s[i] = exponential(s[i] - most);
    const float share = 1 / sum;
    for (int64_t i = 0; i < count; i++) s[i] *= share;
    lse[h] = most + logf(sum);
  }
  NAMED(gather)(l, lo, count, scores, output, size);
}

/* A size known at compile time is what makes the inner loops straight lines. */
static void NAMED(attend_row)(
    const Layer *l, int64_t row, int64_t ahead, int64_t lo, int64_t count, float *scores, float *output, float *lse) {
  switch (l->size) {
    case 32: NAMED(attend_sized)(l, row, ahead, lo, count, scores, output, lse, 32); break;
    case 64: NAMED(attend_sized)(l, row, ahead, lo, count, scores, output, lse, 64); break;
    case 128: NAMED(attend_sized)(l, row, ahead, lo, count, scores, output, lse, 128); break;
    default: NAMED(attend_sized)(l, row, ahead, lo, count, scores, output, lse, l->size);
  }
}

/* A tile's keys and values of one kv head, as float32 side by side, `wide` apart; what is between size and wide stays. */
static void NAMED(pack)(
    const Layer *l, int64_t lo, int64_t count, int64_t head, int64_t wide, float *keys, float *values) {
  const int64_t step = l->kv_heads * l->size;
  const NUMBER *k = (const NUMBER *)l->keys + lo * step + head * l->size;
  const NUMBER *v = (const NUMBER *)l->values + lo * step + head * l->size;
  for (int64_t s = 0; s < count; s++, k += step, v += step)
    for (int64_t d = 0; d < l->size; d++) {
      keys[s * wide + d] = WIDEN(k[d]);
      values[s * wide + d] = WIDEN(v[d]);
    }
}
