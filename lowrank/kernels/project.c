/* The product of a matrix's few columns and a long matrix, in one read of the long one, at the speed of memory; with bits
   in the same pass that sets the long one to zero where a bit is not set. */

#include <string.h>

#include "team.h"

#define COLUMNS 4096 /* of x, that a thread takes at a time; a multiple of all vectors */
#define LINE 16      /* numbers that come to the cache together */
#define AHEAD 4096   /* numbers of x, which are called for so far ahead of their turn, */
#define FARTHEST 512 /* but of a row no farther than so many */
#define WORK 262144  /* multiplications that a thread is worth */

struct product {
  float *x;             /* (n, m) */
  const float *s;       /* (n, r) */
  float *out;           /* (r, m) */
  const uint8_t *bits;  /* one for each number of x, of which rows are whole bytes; or NULL: x stays as it is */
  int64_t n, m, r;
};

/* The columns from c on, fewer than a vector. */
static void the_last(const struct product *p, int64_t c, int64_t end) {
  for (; c < end; c++) {
    for (int64_t i = 0; p->bits && i < p->n; i++)
      if (!(p->bits[(i * p->m + c) / 8] >> c % 8 & 1)) p->x[i * p->m + c] = 0;
    for (int64_t k = 0; k < p->r; k++) {
      float sum = 0;
      for (int64_t i = 0; i < p->n; i++) sum += p->x[i * p->m + c] * p->s[i * p->r + k];
      p->out[k * p->m + c] = sum;
    }
  }
}

#define NAME(name) name##_plain
#define TARGET
#define WIDTH 4
#if defined(__x86_64__)
#define MOST 1
#else
#define MOST 3 /* of twice as many registers */
#endif
#define LONG 8
#include "project.h"
#if defined(__x86_64__)
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define MOST 2
#define LONG 6
#include "project.h"
#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f")))
#define WIDTH 16
#define MOST 5
#define LONG 4
#include "project.h"
#endif

static void run(const struct product *p, int threads) {
  const int64_t blocks = (p->m + COLUMNS - 1) / COLUMNS, worth = p->n * p->m * p->r / WORK;
  if (worth < threads) threads = worth < 1 ? 1 : (int)worth;
  task t = {.piece = OF_WIDTH(piece), .a = p, .count = blocks, .step = (blocks + 4 * threads - 1) / (4 * threads)};
  lowrank_run(&t, threads);
}

/* out (r, m) = s^T x of x (n, m) and s (n, r). Each of its columns is made of one of x's, so threads do not matter. */
void lowrank_project_float(const float *x, const float *s, float *out, int64_t n, int64_t m, int64_t r, int threads) {
  const struct product p = {(float *)x, s, out, NULL, n, m, r};
  run(&p, threads);
}

/* The same of x with zeros where a bit is not set, which are written to it; m a multiple of 8. */
void lowrank_masked_project_float(float *x, const uint8_t *bits, const float *s, float *out, int64_t n, int64_t m,
                                  int64_t r, int threads) {
  const struct product p = {x, s, out, bits, n, m, r};
  run(&p, threads);
}
