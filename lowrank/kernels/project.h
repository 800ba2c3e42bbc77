/* Included once for each kind of processor, with NAME, TARGET, WIDTH, the numbers of a vector, and MOST and LONG, the
   columns of s and the vectors of each whose sums it holds beside each other. */

typedef float NAME(vector) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define VECTOR(place) (*(NAME(vector) *)(place))
#define INLINE static inline TARGET __attribute__((always_inline))

/* out[k] = sum over i of s[i][k] x[i], of K columns of s, and P vectors of each. As much is called for `ahead`, unless
   that is zero. */
INLINE void NAME(few)(const struct product *p, const float *x, const float *s, float *out, int64_t ahead, const int K,
                      const int P) {
  NAME(vector) sums[MOST][LONG];
  for (int k = 0; k < K; k++)
    for (int j = 0; j < P; j++) sums[k][j] = (NAME(vector)){0};
  for (int64_t i = 0; i < p->n; i++, x += p->m, s += p->r) {
    /* There may be more rows than streams that the processor follows by itself. */
    for (int j = 0; ahead && j < P * WIDTH; j += LINE) __builtin_prefetch(x + ahead + j, 0, 2);
    for (int j = 0; j < P; j++) {
      const NAME(vector) numbers = *(const NAME(vector) *)(x + j * WIDTH);
      for (int k = 0; k < K; k++) sums[k][j] += numbers * s[k];
    }
  }
  for (int k = 0; k < K; k++)
    for (int j = 0; j < P; j++) VECTOR(out + k * p->m + j * WIDTH) = sums[k][j];
}

/* The same of all columns of s, as evenly many at a time as may be; of all but the first, x is in the nearest cache. */
INLINE void NAME(all)(const struct product *p, int64_t c, int64_t ahead, const int P) {
  for (int64_t k = 0, count; k < p->r; k += count, ahead = 0) {
    const int64_t left = p->r - k, groups = (left + MOST - 1) / MOST;
    count = (left + groups - 1) / groups;
#define CASE(K)                                                                                                        \
  case K:                                                                                                              \
    if (K <= MOST) NAME(few)(p, p->x + c, p->s + k, p->out + k * p->m + c, ahead, K <= MOST ? K : 1, P);               \
    break;
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) }
#undef CASE
  }
}

static TARGET void NAME(piece)(const task *t, int64_t block, int64_t to) {
  const struct product *p = t->a;
  const int64_t end = to * COLUMNS < p->m ? to * COLUMNS : p->m;
  int64_t c = block * COLUMNS, ahead = AHEAD / p->n;
  ahead = ahead < LONG * WIDTH ? LONG * WIDTH : ahead > FARTHEST ? FARTHEST : ahead;
  for (; c + LONG * WIDTH <= end; c += LONG * WIDTH) NAME(all)(p, c, ahead, LONG);
  for (; c + WIDTH <= end; c += WIDTH) NAME(all)(p, c, ahead, 1);
  the_last(p, c, end);
}

#undef VECTOR
#undef INLINE
#undef NAME
#undef TARGET
#undef WIDTH
#undef MOST
#undef LONG
