/* One pass over memory each, for CPU tensors that fill their memory. Plain C11, no header of PyTorch: what is built here
   serves every version of it. Vectors of 16 bytes, which all of x86-64 and 64-bit Arm have. */

#include <string.h>

#include "clamp.h"
#include "team.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define PIECE 65536 /* elements that one thread takes at a time; a multiple of 8 */
#define LARGE 4194304 /* elements of a tensor that has left the cache before it is read again */

/* --- Gates: which elements a curve of two slopes passes on. As PyTorch's backward operators have it, NaN included. */

enum { ABOVE, BETWEEN, STRICTLY_ABOVE, NOT_ZERO };

#define GATE(rule, x, low, high)                                                                                       \
  ((rule) == ABOVE     ? !((x) <= (low))                                                                               \
   : (rule) == BETWEEN ? (x) > (low) && (x) < (high)                                                                    \
   : (rule) == STRICTLY_ABOVE ? (x) > (low)                                                                            \
                              : (x) != 0)

#define PACK_SCALAR(T)                                                                                                 \
  static uint8_t byte_##T(int rule, const T *x, int64_t n, T low, T high) {                                            \
    uint8_t found = 0;                                                                                                 \
    for (int i = 0; i < n; i++) found |= (uint8_t)(GATE(rule, x[i], low, high) << i);                                  \
    return found;                                                                                                      \
  }
PACK_SCALAR(float)
PACK_SCALAR(double)

#if defined(__SSE2__)
#define BOTH(OP) (_mm_movemask_ps(OP(v, l)) | _mm_movemask_ps(OP(w, l)) << 4)
static inline uint8_t eight_float(int rule, const float *x, float low, float high) {
  __m128 v = _mm_loadu_ps(x), w = _mm_loadu_ps(x + 4), l = _mm_set1_ps(low), h = _mm_set1_ps(high);
  if (rule == ABOVE) return (uint8_t)BOTH(_mm_cmpnle_ps);
  if (rule == STRICTLY_ABOVE) return (uint8_t)BOTH(_mm_cmpgt_ps);
  if (rule == NOT_ZERO) return l = _mm_setzero_ps(), (uint8_t)BOTH(_mm_cmpneq_ps);
  v = _mm_and_ps(_mm_cmpgt_ps(v, l), _mm_cmplt_ps(v, h));
  w = _mm_and_ps(_mm_cmpgt_ps(w, l), _mm_cmplt_ps(w, h));
  return (uint8_t)(_mm_movemask_ps(v) | _mm_movemask_ps(w) << 4);
}
#else
#define eight_float(rule, x, low, high) byte_float(rule, x, 8, low, high)
#endif
#define eight_double(rule, x, low, high) byte_double(rule, x, 8, low, high)

/* A loop for each rule, of which the compiler knows the rule. */
#define PACK_LOOP(T, RULE)                                                                                             \
  case RULE:                                                                                                           \
    for (; from + 8 <= to; from += 8) bits[from / 8] = eight_##T(RULE, x + from, low, high);                           \
    break;

#define PACK(T)                                                                                                        \
  static void pack_piece_##T(const task *t, int64_t from, int64_t to) {                                                \
    const T *x = t->a, low = (T)t->low, high = (T)t->high;                                                             \
    uint8_t *bits = t->bits;                                                                                           \
    switch (t->rule) {                                                                                                 \
      PACK_LOOP(T, ABOVE) PACK_LOOP(T, BETWEEN) PACK_LOOP(T, STRICTLY_ABOVE) PACK_LOOP(T, NOT_ZERO)                    \
    }                                                                                                                  \
    if (from < to) bits[from / 8] = byte_##T(t->rule, x + from, to - from, low, high);                                 \
  }                                                                                                                    \
  void lowrank_pack_##T(const T *x, uint8_t *bits, int64_t count, int rule, double low, double high, int threads) {    \
    task t = {.piece = pack_piece_##T, .a = x, .bits = bits, .count = count, .step = PIECE, .low = low, .high = high,  \
              .rule = rule};                                                                                           \
    lowrank_run(&t, threads);                                                                                                  \
  }
PACK(float)
PACK(double)

/* --- Both a gate's bits and `clamp(x, low, high)`, NaN included, which may be written to where x lies. */

#if defined(__SSE2__)
static inline void clamped(const float *x, float *out, float low, float high) { /* where neither is more, the second */
  const __m128 l = _mm_set1_ps(low), h = _mm_set1_ps(high);
  const __m128 v = _mm_min_ps(h, _mm_max_ps(l, _mm_loadu_ps(x))), w = _mm_min_ps(h, _mm_max_ps(l, _mm_loadu_ps(x + 4)));
  _mm_storeu_ps(out, v), _mm_storeu_ps(out + 4, w);
}
#else
static inline void clamped(const float *x, float *out, float low, float high) {
  for (int i = 0; i < 8; i++) {
    const float least = low > x[i] ? low : x[i];
    out[i] = high < least ? high : least;
  }
}
#endif

#define CLAMP_LOOP(RULE)                                                                                               \
  for (; from + 8 <= to; from += 8) {                                                                                  \
    bits[from / 8] = eight_float(RULE, x + from, low, high);                                                           \
    clamped(x + from, out + from, low, high);                                                                          \
  }

void lowrank_clamp_piece(const task *t, int64_t from, int64_t to) {
  const float *x = t->a, low = (float)t->low, high = (float)t->high;
  float *out = t->out;
  uint8_t *bits = t->bits;
  if (!bits) {
    for (; from + 8 <= to; from += 8) clamped(x + from, out + from, low, high);
  } else if (t->rule == ABOVE) {
    CLAMP_LOOP(ABOVE)
  } else {
    CLAMP_LOOP(BETWEEN)
  }
  if (bits && from < to) bits[from / 8] = byte_float(t->rule, x + from, to - from, low, high);
  for (; from < to; from++) {
    const float least = low > x[from] ? low : x[from];
    out[from] = high < least ? high : least;
  }
}

void lowrank_clamp_float(const float *x, uint8_t *bits, float *out, int64_t count, int rule, double low, double high,
                         int threads) {
  task t = {.piece = lowrank_clamp_piece, .a = x, .bits = bits, .out = out, .count = count, .step = PIECE, .low = low,
            .high = high, .rule = rule};
  lowrank_run(&t, threads);
}

/* --- Slopes: `inner` times the gradient where the bit is set, elsewhere zero or `outer` times it. */

enum { ZERO_OUTSIDE, SCALED_OUTSIDE };

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef double d2 __attribute__((vector_size(16)));
typedef int64_t l2 __attribute__((vector_size(16)));

/* Past the cache, into which memory would be read ahead of the write. */
#if defined(__SSE2__)
#define STREAM(place, value) _mm_stream_si128((__m128i *)(place), (__m128i)(value))
#define STREAMED() _mm_sfence()
#else
#define STREAM(place, value) memcpy(place, &(value), sizeof(value))
#define STREAMED() (void)0
#endif

static inline void slopes_float(int rule, const float *g, unsigned byte, float *out, float inner, float outer,
                                int stream) {
  const i4 powers[2] = {{1, 2, 4, 8}, {16, 32, 64, 128}};
  const int32_t b = (int32_t)byte;
  for (int half = 0; half < 2; half++) {
    const i4 all = {b, b, b, b}, mask = (all & powers[half]) == powers[half];
    f4 v;
    memcpy(&v, g + 4 * half, sizeof v);
    i4 found = (i4)(v * inner) & mask;
    if (rule == SCALED_OUTSIDE) found |= (i4)(v * outer) & ~mask;
    if (stream)
      STREAM(out + 4 * half, found);
    else
      memcpy(out + 4 * half, &found, sizeof found);
  }
}

static inline void slopes_double(int rule, const double *g, unsigned byte, double *out, double inner, double outer,
                                 int stream) {
  (void)stream;
  for (int pair = 0; pair < 4; pair++) {
    const l2 mask = {-(int64_t)(byte >> (2 * pair) & 1), -(int64_t)(byte >> (2 * pair + 1) & 1)};
    d2 v;
    memcpy(&v, g + 2 * pair, sizeof v);
    l2 found = (l2)(v * inner) & mask;
    if (rule == SCALED_OUTSIDE) found |= (l2)(v * outer) & ~mask;
    memcpy(out + 2 * pair, &found, sizeof found);
  }
}

#define APPLY_LOOP(T, RULE, STREAMS)                                                                                   \
  for (; from + 8 <= to; from += 8) slopes_##T(RULE, g + from, bits[from / 8], out + from, inner, outer, STREAMS);

#define APPLY(T)                                                                                                       \
  static void apply_piece_##T(const task *t, int64_t from, int64_t to) {                                               \
    const T *g = t->a, inner = (T)t->low, outer = (T)t->high;                                                          \
    const uint8_t *bits = t->bits;                                                                                     \
    T *out = t->out;                                                                                                   \
    const int streams = t->count >= LARGE && t->out != t->a && (uintptr_t)out % 16 == 0;                               \
    if (t->rule == ZERO_OUTSIDE && streams) {                                                                          \
      APPLY_LOOP(T, ZERO_OUTSIDE, 1)                                                                                   \
      STREAMED();                                                                                                      \
    } else if (t->rule == ZERO_OUTSIDE) {                                                                              \
      APPLY_LOOP(T, ZERO_OUTSIDE, 0)                                                                                   \
    } else {                                                                                                           \
      APPLY_LOOP(T, SCALED_OUTSIDE, 0)                                                                                 \
    }                                                                                                                  \
    for (; from < to; from++) {                                                                                        \
      const int set = bits[from / 8] >> from % 8 & 1;                                                                  \
      out[from] = set ? g[from] * inner : t->rule == ZERO_OUTSIDE ? (T)0 : g[from] * outer;                            \
    }                                                                                                                  \
  }                                                                                                                    \
  void lowrank_apply_##T(const T *g, uint8_t *bits, T *out, int64_t count, int rule, double inner, double outer,       \
                         int threads) {                                                                                \
    task t = {.piece = apply_piece_##T, .a = g, .bits = bits, .out = out, .count = count, .step = PIECE,               \
              .low = inner, .high = outer, .rule = rule};                                                              \
    lowrank_run(&t, threads);                                                                                                  \
  }
APPLY(float)
APPLY(double)

/* --- Inner products of the rows of two matrices; with scales, each row of the second is multiplied by its own behind it,
   while it is in the cache. */

static void rows_piece(const task *t, int64_t from, int64_t to) {
  const int64_t columns = t->columns;
  for (int64_t row = from; row < to; row++) {
    const float *a = (const float *)t->a + row * columns;
    float *b = (float *)t->bits + row * columns;
    f4 sums[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 16 <= columns; i += 16)
      for (int j = 0; j < 4; j++) {
        f4 v, w;
        memcpy(&v, a + i + 4 * j, sizeof v);
        memcpy(&w, b + i + 4 * j, sizeof w);
        sums[j] += v * w;
      }
    f4 four = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float sum = (four[0] + four[1]) + (four[2] + four[3]);
    for (; i < columns; i++) sum += a[i] * b[i];
    ((float *)t->out)[row] = sum;
    const float *scales = t->b;
    if (scales)
      for (i = 0; i < columns; i++) b[i] *= scales[row];
  }
}

void lowrank_rows_float(const float *a, float *b, const float *scales, float *out, int64_t rows, int64_t columns,
                        int threads) {
  int64_t step = columns > 0 && columns < PIECE ? PIECE / columns : 1;
  task t = {.piece = rows_piece, .a = a, .bits = b, .b = scales, .out = out, .count = rows, .columns = columns,
            .step = step};
  lowrank_run(&t, threads);
}
