/* The product of a matrix of few columns and each of many small matrices, such as a weight gradient against the channels
   of a core, (O, r, K_h K_w), spread over all channels. */

#include <string.h>

#include "team.h"

#define TOGETHER 4  /* matrices that meet a row of the other in turn */
#define LONGEST 16  /* numbers of the longest vector */
#define WORK 262144 /* multiplications that a thread is worth */

struct expand {
  const float *x, *rows; /* (left, n, right); and the matrix (m, n) as (n, m right), each number `right` times */
  float *room, *out;     /* for each piece TOGETHER times (n, LONGEST right); and (left, m, right) */
  int64_t left, n, right, m;
};

/* A row of `right` numbers, LONGEST times. */
static void repeat(const float *x, int64_t right, float *out) {
  memcpy(out, x, sizeof(float) * (size_t)right);
  for (int64_t have = right; have < LONGEST * right; have *= 2) memcpy(out + have, out, sizeof(float) * (size_t)have);
}

#define NAME(name) name##_plain
#define TARGET
#define WIDTH 4
#include "expand.h"
#if defined(__x86_64__)
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#include "expand.h"
#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f")))
#define WIDTH 16
#include "expand.h"
#endif

static int64_t step_of(int64_t left, int64_t multiplications, int threads) {
  const int64_t worth = multiplications / WORK;
  if (worth < threads) threads = worth < 1 ? 1 : (int)worth;
  const int64_t each = (left + 4 * threads - 1) / (4 * threads);
  return (each + TOGETHER - 1) / TOGETHER * TOGETHER;
}

/* Numbers of scratch that it takes. */
int64_t lowrank_expand_room_float(int64_t left, int64_t n, int64_t right, int64_t m, int threads) {
  const int64_t step = step_of(left, left * n * right * m, threads), pieces = (left + step - 1) / step;
  return n * m * right + pieces * TOGETHER * n * LONGEST * right;
}

/* out (left, m, right) of x (left, n, right) and a matrix (m, n). */
void lowrank_expand_float(const float *x, const float *matrix, float *out, float *room, int64_t left, int64_t n,
                          int64_t right, int64_t m, int threads) {
  for (int64_t k = 0; k < n; k++)
    for (int64_t c = 0; c < m; c++)
      for (int64_t p = 0; p < right; p++) room[(k * m + c) * right + p] = matrix[c * n + k];
  const struct expand e = {x, room, room + n * m * right, out, left, n, right, m};
  task t = {.piece = OF_WIDTH(piece), .a = &e, .count = left, .step = step_of(left, left * n * right * m, threads)};
  lowrank_run(&t, threads);
}
