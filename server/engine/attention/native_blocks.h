/* Blocks of query rows over a run of slots, for stretches of queries: matrix products that stay in cache.
 *
 * A row is one query in one of its heads; a task takes up to ROWS rows of one kv head. The scores of a tile of slots lie
 * [slot][row], so that everything a softmax does goes down the slots with rows side by side, and keys need no transpose.
 * The softmax is online (Milakov & Gimelshein 2018): `most` and `sum` are of the tiles so far, and what was gathered
 * shrinks when a larger score turns up.
 */
enum {
  ROWS = 192,   /* of a task, as many as make the packing of a tile cheap */
  SLOTS = 64,   /* of a tile */
  LANES = 16,   /* floats of a vector; rows, and sizes, are filled up to a multiple */
  BESIDE = 32,  /* rows whose scores are made at a time: two vectors, with eight slots sixteen sums */
  ABREAST = 4   /* rows that gather values at a time */
};
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

typedef struct {
  int64_t wide;               /* a head's size, filled up to LANES: the stride of queries, keys, values and outputs */
  float *queries;             /* [ROWS / BESIDE][wide][BESIDE], scaled */
  float *keys, *values;       /* [SLOTS][wide] */
  float *outputs;             /* [ROWS][wide] */
  float scores[SLOTS][BESIDE], shrink[BESIDE];
  float most[ROWS], sum[ROWS];
  int64_t first[ROWS], end[ROWS]; /* of the slots that a row sees, counted from the item's first */
  int64_t head[ROWS], ahead[ROWS]; /* a row's head; how far before the query the item's first slot is */
} Block;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t filled(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* NULL where memory ran out; `free` takes it back whole. */
static Block *new_block(int64_t size) {
  const int64_t wide = filled(size, LANES);
  Block *b = calloc(1, sizeof(Block) + sizeof(float) * wide * 2 * (ROWS + SLOTS));
  if (b == NULL) return NULL;
  b->wide = wide;
  b->queries = (float *)(b + 1);
  b->outputs = b->queries + ROWS * wide;
  b->keys = b->outputs + ROWS * wide;
  b->values = b->keys + SLOTS * wide;
  return b;
}

/* scores[s][r] = key[s] . query[r] for BESIDE rows and the tile's slots, eight at a time */
static void score_block(Block *b, int64_t row, int64_t count) {
  for (int64_t s = 0; s < count; s += AT_ONCE) {
    Lanes sums[AT_ONCE][2];
    memset(sums, 0, sizeof sums);
    const float *k = b->keys + s * b->wide;
    const Lanes *q = (const Lanes *)(b->queries + row * b->wide);
    for (int64_t d = 0; d < b->wide; d++, q += 2)
#pragma GCC unroll 8
      for (int i = 0; i < AT_ONCE; i++) {
        sums[i][0] += k[i * b->wide + d] * q[0];
        sums[i][1] += k[i * b->wide + d] * q[1];
      }
    memcpy(b->scores[s], sums, sizeof sums);
  }
}

/* Scores become shares that are not yet divided by their sum; a slot that a row does not see gets exactly 0. */
static void soften_block(const Layer *l, Block *b, int64_t row, int64_t lo, int64_t count) {
  float *most = b->most + row, *sum = b->sum + row, higher[BESIDE];
  int hidden = 0;
  for (int r = 0; r < BESIDE; r++) hidden |= b->first[row + r] > lo || b->end[row + r] < lo + count;
  if (l->softcap > 0)
    for (int64_t s = 0; s < count; s++)
      for (int r = 0; r < BESIDE; r++) b->scores[s][r] = l->softcap * tanhf(b->scores[s][r] / l->softcap);
  if (l->bias)
    for (int r = 0; r < BESIDE; r++)
      add_bias(l, b->head[row + r], b->ahead[row + r] - lo, count, &b->scores[0][r], BESIDE);
  if (hidden)
    for (int64_t s = 0; s < count; s++)
      for (int r = 0; r < BESIDE; r++)
        if (lo + s < b->first[row + r] || lo + s >= b->end[row + r]) b->scores[s][r] = -INFINITY;
  memcpy(higher, most, sizeof higher);
  for (int64_t s = 0; s < count; s++)
    for (int r = 0; r < BESIDE; r++) higher[r] = b->scores[s][r] > higher[r] ? b->scores[s][r] : higher[r];
  for (int r = 0; r < BESIDE; r++) {
    /* equal: also where nothing was seen yet, and both are minus infinity */
    b->shrink[r] = most[r] == higher[r] ? 1 : exponential(most[r] - higher[r]);
    sum[r] *= b->shrink[r];
  }
  for (int64_t s = 0; s < count; s++)
    for (int r = 0; r < BESIDE; r++) b->scores[s][r] = exponential(b->scores[s][r] - higher[r]);
  if (hidden)
    for (int64_t s = 0; s < count; s++)
      for (int r = 0; r < BESIDE; r++)
        if (lo + s < b->first[row + r] || lo + s >= b->end[row + r]) b->scores[s][r] = 0;
  for (int64_t s = 0; s < count; s++)
    for (int r = 0; r < BESIDE; r++) sum[r] += b->scores[s][r];
  memcpy(most, higher, sizeof higher);
}

/* outputs[r] = shrink[r] * outputs[r] + sum over s of scores[s][r] * value[s], `vectors` of them from d on */
static inline __attribute__((always_inline)) void gather_rows(
    Block *b, int64_t row, int64_t beside, int64_t d, int64_t count, const int vectors) {
  Lanes sums[ABREAST][4];
  float *output = b->outputs + (row + beside) * b->wide + d;
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sums[r][v] = b->shrink[beside + r] * ((Lanes *)(output + r * b->wide))[v];
  for (int64_t s = 0; s < count; s++) {
    const Lanes *value = (const Lanes *)(b->values + s * b->wide + d);
    const float *share = b->scores[s] + beside;
#pragma GCC unroll 4
    for (int r = 0; r < ABREAST; r++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) sums[r][v] += share[r] * value[v];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) ((Lanes *)(output + r * b->wide))[v] = sums[r][v];
}

static void gather_block(Block *b, int64_t row, int64_t rows, int64_t count) {
  for (int64_t beside = 0; beside < least(rows, BESIDE); beside += ABREAST) {
    int64_t d = 0;
    for (; d + 4 * LANES <= b->wide; d += 4 * LANES) gather_rows(b, row, beside, d, count, 4);
    for (; d + 2 * LANES <= b->wide; d += 2 * LANES) gather_rows(b, row, beside, d, count, 2);
    for (; d < b->wide; d += LANES) gather_rows(b, row, beside, d, count, 1);
  }
}

/* Up to ROWS of an item's rows of one kv head, from `start` on; a query's rows lie together. */
static void attend_block(
    const Layer *l, const int64_t *item, int64_t head, int64_t start, Block *b, float *output, float *lse) {
  const int64_t group = l->query_heads / l->kv_heads, all = item[KV_HI] - item[KV_LO];
  const int64_t rows = least((item[Q_HI] - item[Q_LO]) * group - start, ROWS);
  int64_t first = all, end = 0;
  memset(b->outputs, 0, sizeof(float) * rows * b->wide);
  for (int64_t r = 0; r < filled(rows, BESIDE); r++) {
    const int64_t row = start + least(r, rows - 1), query = item[Q_LO] + row / group; /* the last row fills up */
    const float *q = l->query + query * l->query_row + (head * group + row % group) * l->query_head;
    float *to = b->queries + r / BESIDE * BESIDE * b->wide + r % BESIDE;
    for (int64_t d = 0; d < l->size; d++) to[d * BESIDE] = q[d] * l->scale;
    const int64_t ahead = item[Q_POS] + query - item[Q_LO] - item[KV_POS]; /* the slot at the query's own place */
    b->head[r] = head * group + row % group;
    b->ahead[r] = ahead;
    b->first[r] = item[MASK] == WINDOW ? least(most_of(ahead + 1 - l->window, 0), all) : 0;
    b->end[r] = item[MASK] == FULL ? all : least(most_of(ahead + 1, 0), all);
    first = least(first, b->first[r]);
    end = most_of(end, b->end[r]);
    b->most[r] = -INFINITY;
    b->sum[r] = 0;
  }
  for (int64_t lo = first; lo < end; lo += SLOTS) {
    const int64_t count = least(SLOTS, end - lo);
    (l->is_bfloat16 ? pack_bfloat16 : pack_float32)(l, item[KV_LO] + lo, count, head, b->wide, b->keys, b->values);
    for (int64_t row = 0; row < rows; row += BESIDE) {
      int seen = 0;
      for (int r = 0; r < BESIDE; r++) seen |= b->first[row + r] < lo + count && b->end[row + r] > lo;
      if (!seen) continue;
      score_block(b, row, count);
      soften_block(l, b, row, lo, count);
      gather_block(b, row, rows - row, count);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t row = start + r, place = (item[Q_LO] + row / group) * l->query_heads + head * group + row % group;
    const int sees = b->end[r] > b->first[r];
    const float share = sees ? 1 / b->sum[r] : 0;
    for (int64_t d = 0; d < l->size; d++) output[place * l->size + d] = b->outputs[r * b->wide + d] * share;
    lse[place] = sees ? b->most[r] + logf(b->sum[r]) : -INFINITY;
  }
}
