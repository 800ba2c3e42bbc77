/* The product of a matrix's few columns and a long matrix, in one read of the long one, at the speed of memory. */

#include "team.h"

#define COLUMNS 4096 /* of x, that a thread takes at a time; a multiple of all vectors */
#define LINE 16      /* numbers that come to the cache together */
#define AHEAD 4096   /* numbers of x, which are called for so far ahead of their turn, */
#define FARTHEST 512 /* but of a row no farther than so many */
#define WORK 262144  /* multiplications that a thread is worth */

struct product {
  const float *x, *s; /* (n, m) and (n, r) */
  float *out;         /* (r, m) */
  int64_t n, m, r;
};

/* The columns from c on, fewer than a vector. */
static void the_last(const struct product *p, int64_t c, int64_t end) {
  for (; c < end; c++)
    for (int64_t k = 0; k < p->r; k++) {
      float sum = 0;
      for (int64_t i = 0; i < p->n; i++) sum += p->x[i * p->m + c] * p->s[i * p->r + k];
      p->out[k * p->m + c] = sum;
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

/* out (r, m) = s^T x of x (n, m) and s (n, r). Each of its columns is made of one of x's, so threads do not matter. */
void lowrank_project_float(const float *x, const float *s, float *out, int64_t n, int64_t m, int64_t r, int threads) {
  const struct product p = {x, s, out, n, m, r};
  const int64_t blocks = (m + COLUMNS - 1) / COLUMNS, worth = n * m * r / WORK;
  if (worth < threads) threads = worth < 1 ? 1 : (int)worth;
  task t = {.piece = OF_WIDTH(piece), .a = &p, .count = blocks, .step = (blocks + 4 * threads - 1) / (4 * threads)};
  lowrank_run(&t, threads);
}
