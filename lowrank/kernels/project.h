/* Included once for each kind of processor, with NAME, TARGET, WIDTH, the numbers of a vector, and MOST, the columns of s
   whose sums it holds beside each other. */

typedef float NAME(vector) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define VECTOR(place) (*(NAME(vector) *)(place))
#define INLINE static inline TARGET __attribute__((always_inline))

/* out[k] = sum over i of s[i][k] x[i], of K columns of s, `rows` rows of x, and P vectors of each; added to what is
   there, or not. Reading x, it calls for as many numbers `ahead`, in the order in which they lie, so that the processor
   goes on by itself. */
INLINE void NAME(few)(const struct product *p, const float *x, const float *s, float *out, int64_t rows, int add,
                      const float *ahead, const int K, const int P) {
  NAME(vector) sums[MOST][2];
  for (int k = 0; k < K; k++)
    for (int j = 0; j < P; j++) sums[k][j] = add ? VECTOR(out + k * p->m + j * WIDTH) : (NAME(vector)){0};
  for (int64_t i = 0; i < rows; i++, x += p->m, s += p->r) {
    for (int j = 0; j < P * WIDTH; j += 16) __builtin_prefetch(ahead + i * P * WIDTH + j);
    for (int k = 0; k < K; k++)
      for (int j = 0; j < P; j++) sums[k][j] += *(const NAME(vector) *)(x + j * WIDTH) * s[k];
  }
  for (int k = 0; k < K; k++)
    for (int j = 0; j < P; j++) VECTOR(out + k * p->m + j * WIDTH) = sums[k][j];
}

/* The same of all columns of s, as evenly many at a time as may be. */
INLINE void NAME(all)(const struct product *p, const float *x, const float *s, float *out, int64_t rows, int add,
                      const float *ahead, const int P) {
  for (int64_t k = 0, count; k < p->r; k += count) {
    const int64_t left = p->r - k, groups = (left + MOST - 1) / MOST;
    count = (left + groups - 1) / groups;
#define CASE(K)                                                                                                        \
  case K:                                                                                                              \
    if (K <= MOST) NAME(few)(p, x, s + k, out + k * p->m, rows, add, ahead, K <= MOST ? K : 1, P);                     \
    break;
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) }
#undef CASE
  }
}

static TARGET void NAME(piece)(const task *t, int64_t block, int64_t to) {
  const struct product *p = t->a;
  for (; block < to; block++)
    for (int64_t row = 0; row < p->n; row += ROWS) {
      const int64_t end = (block + 1) * COLUMNS < p->m ? (block + 1) * COLUMNS : p->m;
      const int64_t rows = p->n - row < ROWS ? p->n - row : ROWS;
      const int64_t first = block * COLUMNS;
      const float *x = p->x + row * p->m, *s = p->s + row * p->r;
      const float *next = row + rows < p->n ? x + rows * p->m + first : p->x + end;
      int64_t c = first;
#define AHEAD (next + (c - first) * rows / COLUMNS * p->m + (c - first) * rows % COLUMNS)
      for (; c + 2 * WIDTH <= end; c += 2 * WIDTH) NAME(all)(p, x + c, s, p->out + c, rows, row > 0, AHEAD, 2);
      for (; c + WIDTH <= end; c += WIDTH) NAME(all)(p, x + c, s, p->out + c, rows, row > 0, AHEAD, 1);
#undef AHEAD
      if (c < end) the_last(p, x, s, rows, row > 0, c);
    }
}

#undef VECTOR
#undef INLINE
#undef NAME
#undef TARGET
#undef WIDTH
#undef MOST
