/* Products of a tile, `count` rows of w numbers at a stride, with matrices of few rows or columns. Included once for each
   kind of processor, with NAME, TARGET and WIDTH, the numbers of a vector, at most w.

   Where WIDTH does not divide w, the last vector of a row overlaps the one ahead. "In vectors" is said of a matrix each
   row of which is laid out as such vectors, one behind the other, PADDED(w) numbers in all. */

typedef float NAME(vector) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define VECTOR(place) (*(NAME(vector) *)(place))
#define READ(place) (*(const NAME(vector) *)(place))
#define INLINE static inline TARGET __attribute__((always_inline))
#define PADDED(w) (((w) + WIDTH - 1) / WIDTH * WIDTH)

/* out[k][p] = sum over i of s[i][k] x[i][p], of K columns of s, which has r, and P vectors, the last of which is at
   `last`; added to what is there, or not. `each` numbers `ahead` are called for with each row, unless that is NULL. */
INLINE void NAME(project_few)(const float *x, int64_t stride, int64_t count, const float *s, int64_t r, float *out,
                              int64_t row, int64_t last, int add, const float *ahead, const int each, const int K,
                              const int P) {
  NAME(vector) sums[5][MOST];
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) sums[k][p] = add ? READ(out + k * row + p * WIDTH) : (NAME(vector)){0};
  for (int64_t i = 0; i < count; i++, x += stride, s += r) {
    if (ahead)
      for (int p = 0; p < each; p += LINE) __builtin_prefetch(ahead + i * each + p, 0, 2);
    if (MOST > 4) /* with many registers each vector is read once, with few a number of s */
      for (int p = 0; p < P; p++) {
        const NAME(vector) numbers = READ(x + (p < P - 1 ? p * WIDTH : last));
        for (int k = 0; k < K; k++) sums[k][p] += numbers * s[k];
      }
    else
      for (int k = 0; k < K; k++)
        for (int p = 0; p < P; p++) sums[k][p] += READ(x + (p < P - 1 ? p * WIDTH : last)) * s[k];
  }
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) VECTOR(out + k * row + p * WIDTH) = sums[k][p];
}

/* Of one vector and eight columns: four sums would wait for each other. What is called for is a `step` from row to row. */
INLINE void NAME(project_eight)(const float *x, int64_t stride, int64_t count, const float *s, int64_t r, float *out,
                                int64_t row, int add, const float *ahead, int64_t step) {
  NAME(vector) sums[8];
  for (int k = 0; k < 8; k++) sums[k] = add ? READ(out + k * row) : (NAME(vector)){0};
  for (int64_t i = 0; i < count; i++, x += stride, s += r) {
    if (ahead) __builtin_prefetch(ahead + i * step, 0, 2);
    const NAME(vector) numbers = READ(x);
    for (int k = 0; k < 8; k++) sums[k] += numbers * s[k];
  }
  for (int k = 0; k < 8; k++) VECTOR(out + k * row) = sums[k];
}

INLINE void NAME(project_vectors)(const float *x, int64_t stride, int64_t count, const float *s, int64_t r, float *out,
                                  int64_t row, int64_t last, int add, const float *ahead, int64_t step, const int P) {
  const int all = P * WIDTH, half = all / 2;
  int64_t k = 0;
  if (MOST == 7 && P < 7 && r == 5) { /* as with a column of ones, which would take a read of its own */
    NAME(project_few)(x, stride, count, s, r, out, row, last, add, step == all ? ahead : NULL, all, 5, P < 7 ? P : 1);
    return;
  }
  for (; P == 1 && k + 8 <= r; k += 8, ahead = NULL)
    NAME(project_eight)(x + last, stride, count, s + k, r, out + k * row, row, add, ahead, step);
  if (step != all) ahead = NULL;
  if (P > 1 && r >= 8 && ahead) { /* one half at a time, so that memory always has something to do */
    for (; k < 8; k += 4, ahead += count * half)
      NAME(project_few)(x, stride, count, s + k, r, out + k * row, row, last, add, ahead, half, 4, P);
    ahead = NULL;
  }
  for (; k + 4 <= r; k += 4, ahead = NULL)
    NAME(project_few)(x, stride, count, s + k, r, out + k * row, row, last, add, ahead, all, 4, P);
  s += k, out += k * row;
  if (r - k == 3) NAME(project_few)(x, stride, count, s, r, out, row, last, add, ahead, all, 3, P);
  if (r - k == 2) NAME(project_few)(x, stride, count, s, r, out, row, last, add, ahead, all, 2, P);
  if (r - k == 1) NAME(project_few)(x, stride, count, s, r, out, row, last, add, ahead, all, 1, P);
}

/* out = s^T x, (r, w) in vectors, of s (count, r); added to what is there, or not. As many vectors of a row at a time as
   there is room for: memory is fast where it is read in order. While it is at some rows, it calls for those behind, and at
   the last for the first of the next such tile, which is a `jump` ahead; 0: for none. */
static TARGET void NAME(project)(const float *x, int64_t stride, int64_t count, int64_t w, const float *s, int64_t r,
                                 float *out, int add, int64_t jump) {
  const int64_t row = PADDED(w), vectors = row / WIDTH, most = r == 5 && MOST == 7 ? 6 : MOST,
                turns = (vectors + most - 1) / most;
  const int64_t few = NEAR / w < 16 ? 16 : NEAR / w;
  for (int64_t from = 0; from < count; from += few, add = 1) {
    const int64_t rows = count - from < few ? count - from : few;
    const float *next = from + rows < count ? x + (from + rows) * stride : x + jump;
    for (int64_t turn = 0; turn < turns; turn++) {
      const int64_t at = vectors * turn / turns * WIDTH, end = vectors * (turn + 1) / turns * WIDTH;
      const int64_t last = (end > w ? w : end) - WIDTH - at, step = w == stride ? end - at : stride;
      const float *a = x + from * stride + at, *b = s + from * r;
      const float *ahead = !jump ? NULL : w == stride ? next + at * rows : next + at;
      switch ((end - at) / WIDTH) {
#define TURN(P)                                                                                                        \
  case P:                                                                                                              \
    NAME(project_vectors)(a, stride, rows, b, r, out + at, row, last, add, ahead, step, P);                            \
    break;
        TURN(1) TURN(2) TURN(3)
#if MOST == 7
        TURN(4) TURN(5) TURN(6) TURN(7)
#endif
#undef TURN
      }
    }
  }
}

/* The sum of each. */
INLINE four NAME(totals)(NAME(vector) a, NAME(vector) b, NAME(vector) c, NAME(vector) d) {
  const NAME(vector) s = SHUFFLED(a, b, LOW) + SHUFFLED(a, b, HIGH), t = SHUFFLED(c, d, LOW) + SHUFFLED(c, d, HIGH);
  const NAME(vector) sums = SHUFFLED(s, t, FIRST) + SHUFFLED(s, t, LAST);
  four parts[WIDTH / 4];
  memcpy(parts, &sums, sizeof parts);
  for (int i = 1; i < WIDTH / 4; i++) parts[0] += parts[i];
  return parts[0];
}

/* out[i][k] += sum over p of x[i][p] z[k][p], of I rows of x and K of z, which is in vectors; and over `tiles` of both,
   the next a `jump` behind in x and a matrix behind in z. */
INLINE void NAME(correlate_few)(const float *x, int64_t stride, int64_t w, int64_t tiles, int64_t jump, const float *z,
                                int64_t r, float *out, const int I, const int K) {
  NAME(vector) sums[16];
  const int64_t row = PADDED(w);
  for (int j = 0; j < I * K; j++) sums[j] = (NAME(vector)){0};
  for (int64_t t = 0; t < tiles; t++, x += jump, z += r * row)
    for (int64_t p = 0; p < w; p += WIDTH) {
      const float *from = x + (p + WIDTH <= w ? p : w - WIDTH);
      for (int i = 0; i < I; i++)
        for (int k = 0; k < K; k++) sums[i * K + k] += READ(from + i * stride) * READ(z + k * row + p);
    }
  for (int j = 0; j < I * K; j += 4) {
    const int last = I * K - 1;
    const four found = NAME(totals)(sums[j], sums[j + 1 < last ? j + 1 : last], sums[j + 2 < last ? j + 2 : last],
                                    sums[j + 3 < last ? j + 3 : last]);
    if (K == 4 || (K == 1 && r == 1 && I % 4 == 0))
      *(loose *)(out + j / K * r) += found;
    else
      for (int q = 0; q < 4 && j + q < I * K; q++) out[(j + q) / K * r + (j + q) % K] += found[q];
  }
}

INLINE void NAME(correlate_rows)(const float *x, int64_t stride, int64_t count, int64_t w, int64_t tiles, int64_t jump,
                                 const float *z, int64_t r, float *out, const int I, const int K) {
  int64_t i = 0;
  for (; i + I <= count; i += I) NAME(correlate_few)(x + i * stride, stride, w, tiles, jump, z, r, out + i * r, I, K);
  for (; i < count; i++) NAME(correlate_few)(x + i * stride, stride, w, tiles, jump, z, r, out + i * r, 1, K);
}

/* out += x z^T, (count, r), of z (r, w) in vectors, zero where they overlap; and of the tiles behind. */
static TARGET void NAME(correlate)(const float *x, int64_t stride, int64_t count, int64_t w, int64_t tiles, int64_t jump,
                                   const float *z, int64_t r, float *out) {
  const int64_t row = PADDED(w);
  int64_t k = 0;
  for (; k + 4 <= r; k += 4) NAME(correlate_rows)(x, stride, count, w, tiles, jump, z + k * row, r, out + k, PARTS == 4 ? 4 : 2, 4);
  z += k * row, out += k;
  if (r - k == 3) NAME(correlate_rows)(x, stride, count, w, tiles, jump, z, r, out, PARTS == 4 ? 4 : 2, 3);
  if (r - k == 2) NAME(correlate_rows)(x, stride, count, w, tiles, jump, z, r, out, 4, 2);
  if (r - k == 1) NAME(correlate_rows)(x, stride, count, w, tiles, jump, z, r, out, 8, 1);
}

static TARGET void NAME(clear_overlap)(float *z, int64_t r, int64_t w) {
  const int64_t row = PADDED(w);
  for (int64_t k = 0; k < r; k++) memset(z + k * row + row - WIDTH, 0, sizeof(float) * (size_t)(row - w));
}

/* A matrix (r, w) in vectors out of, or into, one whose element (k, p) is at k * down + p * along. */
static TARGET void NAME(arrange)(float *z, int64_t r, int64_t w, float *a, int64_t down, int64_t along, int into) {
  const int64_t row = PADDED(w);
  if (along == 1) {
    for (int64_t k = 0; k < r; k++, z += row, a += down)
      for (int64_t p = 0; p < row; p += WIDTH) {
        float *place = a + (p + WIDTH <= w ? p : w - WIDTH);
        if (into)
          VECTOR(place) = READ(z + p);
        else
          VECTOR(z + p) = READ(place);
      }
    return;
  }
  for (int64_t k = 0; k < r; k++)
    for (int64_t p = 0; p < row; p++) {
      float *place = a + k * down + (p < w / WIDTH * WIDTH ? p : p - row + w) * along;
      if (into)
        *place = z[k * row + p];
      else
        z[k * row + p] = *place;
    }
}

static const struct tile_kernels NAME(kernels) = {
    NAME(project), NAME(correlate), NAME(clear_overlap), NAME(arrange), WIDTH,
};

#undef VECTOR
#undef READ
#undef INLINE
#undef PADDED
#undef WIDTH
#undef PARTS
#undef MOST
#undef TARGET
#undef NAME
#undef LOW
#undef HIGH
#undef FIRST
#undef LAST
