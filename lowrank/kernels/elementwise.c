/* Chains of elementwise operations in one pass over memory, for the vectors that the processor has. */

#include <math.h>
#include <string.h>

#include "team.h"

#define PIECE 16384 /* elements that one thread takes at a time */

enum { SILU, GELU };

struct vectors { /* one number for each channel */
  const float *scale, *shift;
  int64_t channels;
};

struct chains {
  void (*affine)(const task *, int64_t, int64_t), (*gate)(const task *, int64_t, int64_t),
      (*slopes)(const task *, int64_t, int64_t);
};

#define NAME(name) name##_plain
#define TARGET
#define WIDTH 4
#include "chains.h"
#if defined(__x86_64__)
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#include "chains.h"
#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f")))
#define WIDTH 16
#include "chains.h"
#endif

/* out = min(max(scale x + shift + other, low), high) of x (planes, size), whose planes are of `channels` channels in turn;
   scale, shift: (channels,); other: of x's shape, or NULL. */
void lowrank_affine_float(const float *x, const float *scale, const float *shift, float *other, float *out,
                          int64_t planes, int64_t channels, int64_t size, double low, double high, int threads) {
  const struct vectors with = {scale, shift, channels};
  task t = {.piece = OF_WIDTH(chains).affine, .a = x, .b = &with, .bits = other, .out = out, .count = planes, .columns = size,
            .low = low, .high = high, .step = size > 0 && size < PIECE ? PIECE / size : 1};
  lowrank_run(&t, threads);
}

/* out = f(g) u, f by the rule. */
void lowrank_gate_float(const float *g, const float *u, float *out, int64_t count, int rule, int threads) {
  task t = {.piece = OF_WIDTH(chains).gate, .a = g, .b = u, .out = out, .count = count, .rule = rule, .step = PIECE};
  lowrank_run(&t, threads);
}

/* Of the gradient of f(g) u, those of g and of u. */
void lowrank_slopes_float(const float *grad, const float *g, float *u, float *for_g, float *for_u, int64_t count,
                          int rule, int threads) {
  task t = {.piece = OF_WIDTH(chains).slopes, .a = grad, .b = g, .bits = u, .out = for_g, .room = for_u, .count = count,
            .rule = rule, .step = PIECE};
  lowrank_run(&t, threads);
}
