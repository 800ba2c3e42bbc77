/* A tensor (left, n, right) as (n, left, right), with so few numbers behind that a row of them is one vector. */

#include <string.h>

#include "team.h"

#define TOGETHER 8   /* of `left`, whose rows come next to each other */
#define WORK 1048576 /* bytes that a thread is worth */

struct swap {
  const char *x;
  char *out;
  int64_t left, n, bytes; /* bytes: of a row */
};

/* Whole vectors: what one has beyond its row, that of the next row overwrites, and the last of those together has none. */
#define ROWS(VECTOR)                                                                                                   \
  for (int64_t i = 0; i < s->n; i++) {                                                                                 \
    const char *x = s->x + (first * s->n + i) * bytes;                                                                 \
    char *out = s->out + (i * s->left + first) * bytes;                                                                \
    for (int64_t l = first; l + 1 < end; l++, x += s->n * bytes, out += bytes) memcpy(out, x, VECTOR);                  \
    memcpy(out, x, (size_t)bytes);                                                                                     \
  }

#define PIECE(NAME, TARGET)                                                                                            \
  TARGET static void NAME(const task *t, int64_t from, int64_t to) {                                                   \
    const struct swap *s = t->a;                                                                                       \
    const int64_t bytes = s->bytes;                                                                                    \
    for (int64_t first = from * TOGETHER; first < to * TOGETHER && first < s->left; first += TOGETHER) {               \
      const int64_t end = first + TOGETHER < s->left ? first + TOGETHER : s->left;                                     \
      if (bytes <= 8) {                                                                                                \
        ROWS(8)                                                                                                        \
      } else if (bytes <= 16) {                                                                                        \
        ROWS(16)                                                                                                       \
      } else if (bytes <= 32) {                                                                                        \
        ROWS(32)                                                                                                       \
      } else {                                                                                                         \
        ROWS(64)                                                                                                       \
      }                                                                                                                \
    }                                                                                                                  \
  }
PIECE(piece_plain, )
#if defined(__x86_64__)
PIECE(piece_avx2, __attribute__((target("avx2"))))
PIECE(piece_avx512, __attribute__((target("avx512f"))))
#endif

/* Rows of 5 to 64 bytes, at least 64 bytes of them for each of `left`. */
static void swap(const char *x, char *out, int64_t left, int64_t n, int64_t bytes, int threads) {
  const struct swap s = {x, out, left, n, bytes};
  const int64_t blocks = (left + TOGETHER - 1) / TOGETHER, worth = left * n * bytes / WORK;
  if (worth < threads) threads = worth < 1 ? 1 : (int)worth;
  task t = {.piece = OF_WIDTH(piece), .a = &s, .count = blocks, .step = (blocks + 4 * threads - 1) / (4 * threads)};
  lowrank_run(&t, threads);
}

void lowrank_swap_float(const char *x, char *out, int64_t left, int64_t n, int64_t right, int threads) {
  swap(x, out, left, n, 4 * right, threads);
}

void lowrank_swap_half(const char *x, char *out, int64_t left, int64_t n, int64_t right, int threads) {
  swap(x, out, left, n, 2 * right, threads);
}
