/* Chains of elementwise operations in one pass over memory. Included once for each kind of processor, with NAME, TARGET and
   WIDTH, the numbers of a vector. */

#define LANES NAME(lanes)
#define BITS NAME(bits)
typedef float LANES __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t BITS __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define READ(place) (*(const LANES *)(place))
#define WRITE(place) (*(LANES *)(place))
#define ALL(number) ((LANES){0} + (number))
#define INLINE static inline TARGET __attribute__((always_inline))

INLINE LANES NAME(chosen)(BITS mask, LANES yes, LANES no) { return (LANES)((mask & (BITS)yes) | (~mask & (BITS)no)); }

/* The first `count` numbers at a place; zeros behind them. */
INLINE LANES NAME(some)(const float *from, int64_t count) {
  LANES found = {0};
  memcpy(&found, from, sizeof(float) * (size_t)count);
  return found;
}

/* e^x to two units in the last place; infinity from 88 on, and NaN of NaN. */
INLINE LANES NAME(exponential)(LANES x) {
  const LANES magic = ALL(12582912.0f); /* what is added to it is rounded to a whole number */
  const LANES least = ALL(-87.0f), most = ALL(88.0f);
  const LANES y = NAME(chosen)(x < least, least, NAME(chosen)(x > most, most, x));
  const LANES shifted = y * 1.44269504f + magic, n = shifted - magic;
  const LANES r = (y - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, of which the first is exact */
  LANES sum = r * (1 / 5040.0f) + 1 / 720.0f;
  sum = sum * r + 1 / 120.0f;
  sum = sum * r + 1 / 24.0f;
  sum = sum * r + 1 / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const LANES power = (LANES)(((BITS)shifted + 127) << 23);
  return NAME(chosen)(x > most, ALL(INFINITY), sum * power);
}

/* --- Scale and shift for each channel, a sum, limits. */

INLINE LANES NAME(limited)(LANES y, float low, float high) { /* NaN stays */
  return NAME(chosen)(y < ALL(low), ALL(low), NAME(chosen)(y > ALL(high), ALL(high), y));
}

static TARGET void NAME(affine)(const task *t, int64_t from, int64_t to) {
  const int64_t size = t->columns;
  const struct vectors *with = t->b;
  const float low = (float)t->low, high = (float)t->high;
  for (int64_t plane = from; plane < to; plane++) {
    const float *x = (const float *)t->a + plane * size, *other = t->bits ? (float *)t->bits + plane * size : NULL;
    float *out = (float *)t->out + plane * size;
    const float scale = with->scale[plane % with->channels], shift = with->shift[plane % with->channels];
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
      LANES y = READ(x + i) * scale + shift;
      if (other) y += READ(other + i);
      WRITE(out + i) = NAME(limited)(y, low, high);
    }
    if (i < size) {
      LANES y = NAME(some)(x + i, size - i) * scale + shift;
      if (other) y += NAME(some)(other + i, size - i);
      y = NAME(limited)(y, low, high);
      memcpy(out + i, &y, sizeof(float) * (size_t)(size - i));
    }
  }
}

/* --- Gates: g sigma(p) u, and its gradients, with p(g) = g of SiLU, and of GELU's approximation
   p(g) = 2 sqrt(2 / pi) (g + 0.044715 g^3). */

#define BEND 0.044715f
#define STEEP 1.59576912f

INLINE LANES NAME(sigmoid)(LANES g, const int rule) {
  LANES p = g;
  if (rule == GELU) p = STEEP * (g + BEND * g * g * g);
  return 1.0f / (1.0f + NAME(exponential)(-p));
}

INLINE LANES NAME(gated)(LANES g, LANES u, const int rule) { return g * NAME(sigmoid)(g, rule) * u; }

INLINE void NAME(gate_by)(const task *t, int64_t from, int64_t to, const int rule) {
  const float *g = t->a, *u = t->b;
  float *out = t->out;
  for (; from + WIDTH <= to; from += WIDTH) WRITE(out + from) = NAME(gated)(READ(g + from), READ(u + from), rule);
  if (from < to) {
    const LANES found = NAME(gated)(NAME(some)(g + from, to - from), NAME(some)(u + from, to - from), rule);
    memcpy(out + from, &found, sizeof(float) * (size_t)(to - from));
  }
}

static TARGET void NAME(gate)(const task *t, int64_t from, int64_t to) {
  if (t->rule == SILU)
    NAME(gate_by)(t, from, to, SILU);
  else
    NAME(gate_by)(t, from, to, GELU);
}

INLINE LANES NAME(sloped)(LANES grad, LANES g, LANES u, LANES *for_u, const int rule) {
  const LANES sigmoid = NAME(sigmoid)(g, rule);
  LANES along = g * (1.0f - sigmoid);
  if (rule == GELU) along *= STEEP * (1.0f + 3.0f * BEND * g * g);
  *for_u = grad * (g * sigmoid);
  return grad * u * (sigmoid * (1.0f + along));
}

INLINE void NAME(slopes_by)(const task *t, int64_t from, int64_t to, const int rule) {
  const float *grad = t->a, *g = t->b, *u = t->bits;
  float *for_g = t->out, *for_u = t->room;
  for (; from + WIDTH <= to; from += WIDTH)
    WRITE(for_g + from) = NAME(sloped)(READ(grad + from), READ(g + from), READ(u + from), &WRITE(for_u + from), rule);
  if (from < to) {
    const int64_t rest = to - from;
    const LANES given = NAME(some)(grad + from, rest), by = NAME(some)(g + from, rest);
    LANES other;
    const LANES found = NAME(sloped)(given, by, NAME(some)(u + from, rest), &other, rule);
    memcpy(for_g + from, &found, sizeof(float) * (size_t)rest);
    memcpy(for_u + from, &other, sizeof(float) * (size_t)rest);
  }
}

static TARGET void NAME(slopes)(const task *t, int64_t from, int64_t to) {
  if (t->rule == SILU)
    NAME(slopes_by)(t, from, to, SILU);
  else
    NAME(slopes_by)(t, from, to, GELU);
}

static const struct chains NAME(chains) = {NAME(affine), NAME(gate), NAME(slopes)};

#undef INLINE
#undef STEEP
#undef BEND
#undef ALL
#undef WRITE
#undef READ
#undef BITS
#undef LANES
#undef WIDTH
#undef TARGET
#undef NAME
