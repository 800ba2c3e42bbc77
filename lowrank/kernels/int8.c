/* Numbers in int8 with a scale in bfloat16 for each column or block, and back, see `lowrank.tensors.storage`. */

#include <string.h>

#include "team.h"

#define BLOCK 32
#define BLOCKS 2048   /* that one thread takes at a time */
#define SMALLEST 1e-30f
#define TO_WHOLE 12582912.0f /* 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even */

static inline float wide(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float found;
  memcpy(&found, &bits, sizeof found);
  return found;
}

/* The scale for a largest magnitude, given as its bits, which are in the order of magnitudes, NaN the largest. */
static inline uint16_t scale_of(uint32_t largest) {
  float scale;
  memcpy(&scale, &largest, sizeof scale);
  scale /= 127;
  if (scale < SMALLEST) scale = SMALLEST;
  uint32_t bits;
  memcpy(&bits, &scale, sizeof bits);
  return scale != scale ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint32_t magnitude(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

static inline int8_t rounded(float x, float scale) {
  float q = x / scale;
  q = q > 127 ? 127 : q >= -127 ? q : q < -127 ? -127 : 0; /* NaN: 0, which times its scale is NaN */
  return (int8_t)(int32_t)((q + TO_WHOLE) - TO_WHOLE);
}

static void round_piece(const task *t, int64_t from, int64_t to) {
  for (int64_t block = from; block < to; block++) {
    const float *x = (const float *)t->a + block * BLOCK;
    int8_t *values = (int8_t *)t->bits + block * BLOCK;
    const int64_t left = t->columns - block * BLOCK, count = left < BLOCK ? left : BLOCK;
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
    const uint16_t half = scale_of(largest);
    const float scale = wide(half);
    ((uint16_t *)t->out)[block] = half;
    for (int64_t i = 0; i < count; i++) values[i] = rounded(x[i], scale);
  }
}

static void restore_piece(const task *t, int64_t from, int64_t to) {
  for (int64_t block = from; block < to; block++) {
    const int8_t *values = (const int8_t *)t->a + block * BLOCK;
    float *x = (float *)t->out + block * BLOCK;
    const int64_t left = t->columns - block * BLOCK, count = left < BLOCK ? left : BLOCK;
    const float scale = wide(((const uint16_t *)t->b)[block]);
    for (int64_t i = 0; i < count; i++) x[i] = values[i] * scale;
  }
}

void lowrank_round_blocks_float(const float *x, int8_t *values, uint16_t *scales, int64_t count, int threads) {
  task t = {.piece = round_piece, .a = x, .bits = values, .out = scales, .count = (count + BLOCK - 1) / BLOCK,
            .step = BLOCKS, .columns = count};
  lowrank_run(&t, threads);
}

void lowrank_restore_blocks_int8(float *x, const int8_t *values, const uint16_t *scales, int64_t count, int threads) {
  task t = {.piece = restore_piece, .a = values, .b = scales, .out = x, .count = (count + BLOCK - 1) / BLOCK,
            .step = BLOCKS, .columns = count};
  lowrank_run(&t, threads);
}

void lowrank_round_columns_float(const float *x, int8_t *values, uint16_t *scales, int64_t n, int64_t r) {
  for (int64_t k = 0; k < r; k++) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t found = magnitude(x[i * r + k]);
      largest = found > largest ? found : largest;
    }
    scales[k] = scale_of(largest);
    const float scale = wide(scales[k]);
    for (int64_t i = 0; i < n; i++) values[i * r + k] = rounded(x[i * r + k], scale);
  }
}

void lowrank_restore_columns_int8(float *x, const int8_t *values, const uint16_t *scales, int64_t n, int64_t r) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < r; k++) x[i * r + k] = values[i * r + k] * wide(scales[k]);
}
