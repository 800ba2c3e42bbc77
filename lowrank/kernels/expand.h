/* Included once for each kind of processor, with NAME, TARGET and WIDTH, the numbers of a vector. */

typedef float NAME(vector) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define READ(place) (*(const NAME(vector) *)(place))

/* out[g] = sum over k of rows[k] repeated[g][k], of G matrices: `count` numbers of each. */
static inline TARGET __attribute__((always_inline)) void NAME(stretch)(const struct expand *e, const float *rows,
                                                                       const float *repeated, float *out, int64_t count,
                                                                       const int G) {
  const int64_t all = e->m * e->right, period = LONGEST * e->right;
  int64_t j = 0;
  for (; j + WIDTH <= count; j += WIDTH) {
    NAME(vector) sums[TOGETHER];
    for (int g = 0; g < G; g++) sums[g] = (NAME(vector)){0};
    for (int64_t k = 0; k < e->n; k++) {
      const NAME(vector) row = READ(rows + k * all + j);
      for (int g = 0; g < G; g++) sums[g] += row * READ(repeated + (g * e->n + k) * period + j);
    }
    for (int g = 0; g < G; g++) *(NAME(vector) *)(out + g * all + j) = sums[g];
  }
  for (; j < count; j++)
    for (int g = 0; g < G; g++) {
      float sum = 0;
      for (int64_t k = 0; k < e->n; k++) sum += rows[k * all + j] * repeated[(g * e->n + k) * period + j];
      out[g * all + j] = sum;
    }
}

static TARGET void NAME(piece)(const task *t, int64_t from, int64_t to) {
  const struct expand *e = t->a;
  const int64_t all = e->m * e->right, period = LONGEST * e->right;
  float *repeated = e->room + from / t->step * TOGETHER * e->n * period;
  for (int64_t some; from < to; from += some) {
    some = to - from < TOGETHER ? 1 : TOGETHER;
    for (int64_t row = 0; row < some * e->n; row++)
      repeat(e->x + (from * e->n + row) * e->right, e->right, repeated + row * period);
    for (int64_t at = 0; at < all; at += period) {
      const int64_t count = all - at < period ? all - at : period;
      if (some == 1)
        NAME(stretch)(e, e->rows + at, repeated, e->out + from * all + at, count, 1);
      else
        NAME(stretch)(e, e->rows + at, repeated, e->out + from * all + at, count, TOGETHER);
    }
  }
}

#undef READ
#undef NAME
#undef TARGET
#undef WIDTH
