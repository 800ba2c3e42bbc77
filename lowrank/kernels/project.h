/* Included once for each kind of processor, with NAME, TARGET, WIDTH, the numbers of a vector, and MOST and LONG, the
   columns of s and the vectors of each whose sums it holds beside each other. */

typedef float NAME(vector) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t NAME(mask) __attribute__((vector_size(4 * WIDTH)));
#define VECTOR(place) (*(NAME(vector) *)(place))
#define INLINE static inline TARGET __attribute__((always_inline))

/* The numbers from `place` on where their bits are set, zeros elsewhere. */
INLINE NAME(vector) NAME(passed)(NAME(vector) numbers, const uint8_t *bits, int64_t place) {
  NAME(mask) powers;
  uint16_t found = bits[place / 8];
#if WIDTH == 16
  memcpy(&found, bits + place / 8, sizeof found);
#elif WIDTH == 4
  found >>= place % 8;
#endif
  for (int j = 0; j < WIDTH; j++) powers[j] = 1 << j;
  const NAME(mask) all = (NAME(mask)){0} + (int32_t)found, set = (all & powers) == powers;
  return (NAME(vector))((NAME(mask))numbers & set);
}

/* out[k] = sum over i of s[i][k] x[i], of K columns of s, and P vectors of each, from the column c on. As much is called
   for `ahead`, unless that is zero; where it `masks`, x is set to zero first where a bit is not set. */
INLINE void NAME(few)(const struct product *p, int64_t c, int64_t from, int64_t ahead, const int K, const int P,
                      const int masks) {
  float *x = p->x + c, *out = p->out + from * p->m + c;
  const float *s = p->s + from;
  NAME(vector) sums[MOST][LONG];
  for (int k = 0; k < K; k++)
    for (int j = 0; j < P; j++) sums[k][j] = (NAME(vector)){0};
  for (int64_t i = 0; i < p->n; i++, x += p->m, s += p->r, c += p->m) {
    /* There may be more rows than streams that the processor follows by itself. */
    for (int j = 0; ahead && j < P * WIDTH; j += LINE) __builtin_prefetch(x + ahead + j, 0, 2);
    for (int j = 0; j < P; j++) {
      NAME(vector) numbers = VECTOR(x + j * WIDTH);
      if (masks) VECTOR(x + j * WIDTH) = numbers = NAME(passed)(numbers, p->bits, c + j * WIDTH);
      for (int k = 0; k < K; k++) sums[k][j] += numbers * s[k];
    }
  }
  for (int k = 0; k < K; k++)
    for (int j = 0; j < P; j++) VECTOR(out + k * p->m + j * WIDTH) = sums[k][j];
}

/* The same of all columns of s, as evenly many at a time as may be; of all but the first, x is in the nearest cache. */
INLINE void NAME(all)(const struct product *p, int64_t c, int64_t ahead, const int P, const int masks) {
  for (int64_t k = 0, count; k < p->r; k += count, ahead = 0) {
    const int64_t left = p->r - k, groups = (left + MOST - 1) / MOST;
    count = (left + groups - 1) / groups;
#define CASE(K)                                                                                                        \
  case K:                                                                                                              \
    if (K <= MOST && masks && !k)                                                                                      \
      NAME(few)(p, c, k, ahead, K <= MOST ? K : 1, P, 1);                                                              \
    else if (K <= MOST)                                                                                                \
      NAME(few)(p, c, k, ahead, K <= MOST ? K : 1, P, 0);                                                              \
    break;
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) }
#undef CASE
  }
}

INLINE void NAME(columns)(const struct product *p, int64_t c, int64_t end, const int masks) {
  int64_t ahead = AHEAD / p->n;
  ahead = ahead < LONG * WIDTH ? LONG * WIDTH : ahead > FARTHEST ? FARTHEST : ahead;
  for (; c + LONG * WIDTH <= end; c += LONG * WIDTH) NAME(all)(p, c, ahead, LONG, masks);
  for (; c + WIDTH <= end; c += WIDTH) NAME(all)(p, c, ahead, 1, masks);
  the_last(p, c, end);
}

static TARGET void NAME(piece)(const task *t, int64_t block, int64_t to) {
  const struct product *p = t->a;
  const int64_t end = to * COLUMNS < p->m ? to * COLUMNS : p->m;
  if (p->bits)
    NAME(columns)(p, block * COLUMNS, end, 1);
  else
    NAME(columns)(p, block * COLUMNS, end, 0);
}

#undef VECTOR
#undef INLINE
#undef NAME
#undef TARGET
#undef WIDTH
#undef MOST
#undef LONG
