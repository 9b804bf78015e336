/* Attention over runs of slots, for native.py: single queries row by row, stretches of queries in blocks.
 *
 * Keys and values are [slots, kv_heads, size], float32 or bfloat16, so that a run of slots is one stretch of memory; all sums are float32. NaN and infinity pass through: a row that overflows must be seen to overflow.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../bfloat16.h"

enum { PART, MASK, Q_LO, Q_HI, KV_LO, KV_HI, Q_POS, KV_POS, FIELDS }; /* WorkItem.as_tuple */
enum { FULL, CAUSAL, WINDOW };
enum { AT_ONCE = 8 }; /* slots between two looks at another head: enough to keep its query in registers */
enum { LINE = 64 };   /* bytes of a cache line: the processor does not foresee eight stretches read in turn, so we ask */

typedef struct {
  const float *query; /* [rows, query_heads, size], any strides but the last */
  int64_t query_row, query_head;
  const void *keys, *values;
  int is_bfloat16;
  int64_t query_heads, kv_heads, size, window;
  float scale, softcap;
  const float *bias; /* [query_heads, 2 reach + 1], or NULL; see plain.relative */
  int64_t reach;
} Layer;

/* exp by powers of two and a polynomial, to 2 units in the last place, in a form that vectorizes. */
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  float whole = rintf(x * 1.44269504f);
  float r = fmaf(whole, -0.693145752f, x);
  r = fmaf(whole, -1.42860677e-6f, r);
  float p = 1.98756881e-4f;
  p = fmaf(p, r, 1.39819994e-3f);
  p = fmaf(p, r, 8.33345205e-3f);
  p = fmaf(p, r, 4.16657962e-2f);
  p = fmaf(p, r, 1.66666657e-1f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r * r, r) + 1.0f;
  union { int32_t i; float f; } two;
  two.i = ((int32_t)whole + 127) << 23;
  return p * two.f;
}

/* Adds what relative positions say to a head's scores of `count` slots, which lie `apart`; the first is `ahead` slots
 * before the query. */
static inline void add_bias(const Layer *l, int64_t head, int64_t ahead, int64_t count, float *scores, int64_t apart) {
  const float *bias = l->bias + head * (2 * l->reach + 1) + l->reach;
  for (int64_t s = 0; s < count; s++) {
    const int64_t from = s - ahead < -l->reach ? -l->reach : s - ahead;
    scores[s * apart] += bias[from > l->reach ? l->reach : from];
  }
}

#define NUMBER float
#define WIDEN(x) (x)
#define NAMED(f) f##_float32
#include "native_rows.h"
#undef NUMBER
#undef WIDEN
#undef NAMED

#define NUMBER uint16_t
#define WIDEN(x) from_bfloat16(x)
#define NAMED(f) f##_bfloat16
#include "native_rows.h"

#include "native_blocks.h"

/* own_output becomes attention over both segments; a row without a prefix has a prefix_lse of minus infinity. */
static void merge(float *own, float own_lse, const float *prefix, float prefix_lse, int64_t size) {
  if (prefix_lse == -INFINITY) return;
  const float share = 1 / (1 + expf(own_lse - prefix_lse));
  for (int64_t d = 0; d < size; d++) own[d] += share * (prefix[d] - own[d]);
}

/* The tasks of an item: one for all its rows where they are few, or else some for each kv head. */
static int64_t tasks_of(const Layer *l, const int64_t *item, int64_t few) {
  const int64_t queries = item[Q_HI] - item[Q_LO], rows = queries * (l->query_heads / l->kv_heads);
  return item[MASK] == FULL && queries <= few ? 1 : filled(rows, ROWS) / ROWS * l->kv_heads;
}

/* Outputs [rows, query_heads, size] are of both parts, own first, and of own alone in the end; lses [rows, query_heads]
 * likewise, minus infinity for the prefixes of rows without one. An item with at most `few` queries that see all its
 * slots goes row by row. Returns 0, or 1 where memory ran out. */
int antefix_attend(
    const float *query, int64_t query_row, int64_t query_head, const void *keys, const void *values, int is_bfloat16,
    int64_t query_heads, int64_t kv_heads, int64_t size, int64_t window, float scale, float softcap,
    const float *bias, int64_t reach, const int64_t *work, int64_t items, int64_t rows, int64_t few, int64_t threads,
    float *own_output, float *own_lse, float *prefix_output, float *prefix_lse) {
  const Layer layer = {query,    query_row, query_head, keys,   values, is_bfloat16,
                       query_heads, kv_heads, size,    window, scale,  softcap, bias, reach};
  int64_t tasks = 0;
  for (int64_t i = 0; i < items; i++) tasks += tasks_of(&layer, work + i * FIELDS, few);
  int64_t(*task)[2] = malloc(sizeof *task * tasks); /* its item, and its number within it */
  if (task == NULL) return 1;
  for (int64_t i = 0, t = 0; i < items; i++)
    for (int64_t n = tasks_of(&layer, work + i * FIELDS, few), j = 0; j < n; j++, t++) task[t][0] = i, task[t][1] = j;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Block *block = NULL;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; t++) {
      const int64_t *item = work + task[t][0] * FIELDS, count = item[KV_HI] - item[KV_LO];
      float *output = item[PART] ? prefix_output : own_output, *lse = item[PART] ? prefix_lse : own_lse;
      if (item[MASK] == FULL && item[Q_HI] - item[Q_LO] <= few) {
        float *scores = malloc(sizeof(float) * query_heads * count);
        if ((failed |= scores == NULL)) continue;
        for (int64_t row = item[Q_LO]; row < item[Q_HI]; row++) {
          const int64_t ahead = item[Q_POS] + row - item[Q_LO] - item[KV_POS], place = row * query_heads;
          (is_bfloat16 ? attend_row_bfloat16 : attend_row_float32)(
              &layer, row, ahead, item[KV_LO], count, scores, output + place * size, lse + place);
        }
        free(scores);
      } else {
        if (block == NULL) block = new_block(size);
        if ((failed |= block == NULL)) continue;
        attend_block(&layer, item, task[t][1] % kv_heads, task[t][1] / kv_heads * ROWS, block, output, lse);
      }
    }
    free(block);
#pragma omp for schedule(static)
    for (int64_t h = 0; h < rows * query_heads; h++)
      merge(own_output + h * size, own_lse[h], prefix_output + h * size, prefix_lse[h], size);
  }
  free(task);
  return failed;
}
