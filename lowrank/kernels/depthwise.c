/* The weight gradient of a convolution with a group for each channel. A few channels at a time lie side by side, so that
   every product is one of vectors, whatever the kernel, stride and dilation. */

#include <string.h>

#include "team.h"

#define LANES 16 /* channels at a time */
#define AT_ONCE 6 /* places of a kernel's row */
#define WORK 262144 /* multiplications that a thread is worth */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* As `plan` of `lowrank_depthwise_float` has it, and of the padded image: that all places of the kernel lie on. */
typedef struct {
  int64_t samples, channels, height, width, out_height, out_width, kernel_height, kernel_width, stride_down, stride_along,
      pad_down, pad_along, step_down, step_along, last; /* whether the channels are last in memory */
} layer;

static int64_t padded_height(const layer *l) {
  return (l->out_height - 1) * l->stride_down + (l->kernel_height - 1) * l->step_down + 1;
}
static int64_t padded_width(const layer *l) {
  return (l->out_width - 1) * l->stride_along + (l->kernel_width - 1) * l->step_along + 1;
}

/* Numbers of scratch memory for each thread. */
int64_t lowrank_depthwise_room_float(const int64_t *plan) {
  const layer *l = (const layer *)plan;
  return LANES * (padded_height(l) * padded_width(l) + l->out_height * l->out_width + l->kernel_height * l->kernel_width);
}

#define INLINE static inline __attribute__((always_inline))

/* Rows of an image, of `channels` channels from `first` on, side by side, `out_width` places a row. */
INLINE void side_by_side(const layer *l, const float *x, int64_t first, int64_t channels, int64_t height, int64_t width,
                         int64_t rows, int64_t columns, float *out, int64_t out_width) {
  const int64_t all = l->channels;
  if (l->last) {
    x += first;
    for (int64_t row = 0; row < rows; row++, x += width * all, out += LANES * out_width)
      for (int64_t column = 0; column < columns; column++) {
        const float *from = x + column * all;
        float *to = out + LANES * column;
        if (channels == LANES)
          *(lanes *)to = *(const lanes *)from;
        else
          for (int64_t c = 0; c < channels; c++) to[c] = from[c];
      }
    return;
  }
  x += first * height * width;
  for (int64_t row = 0; row < rows; row++, x += width, out += LANES * out_width)
    for (int64_t c = 0; c < channels; c++)
      for (int64_t column = 0; column < columns; column++) out[LANES * column + c] = x[c * height * width + column];
}

/* Of `count` places of one row of the kernel, the products with all outputs of a sample. */
INLINE void places(const layer *l, const float *x, const float *grad, float *sums, const int count) {
  const int64_t row = LANES * padded_width(l), along = LANES * l->stride_along, apart = LANES * l->step_along;
  lanes found[AT_ONCE]; /* of one sample, so that the sum of all is not one long chain */
  for (int i = 0; i < count; i++) found[i] = (lanes){0};
  for (int64_t h = 0; h < l->out_height; h++, x += l->stride_down * row) {
    const float *from = x;
    for (int64_t w = 0; w < l->out_width; w++, from += along, grad += LANES) {
      const lanes g = *(const lanes *)grad;
      for (int i = 0; i < count; i++) found[i] += *(const lanes *)(from + i * apart) * g;
    }
  }
  for (int i = 0; i < count; i++) *(lanes *)(sums + LANES * i) += found[i];
}

/* `LANES` channels from the first of `block` on. */
INLINE void channels(const task *t, int64_t block, float *room) {
  const layer *l = t->b;
  const int64_t first = block * LANES, left = l->channels - first, count = left < LANES ? left : LANES;
  const int64_t high = padded_height(l), wide = padded_width(l), in = l->height * l->width,
                out = l->out_height * l->out_width, places_down = l->kernel_height, places_along = l->kernel_width;
  float *x = room, *grad = x + LANES * high * wide, *sums = grad + LANES * out;
  const int64_t rows = high - l->pad_down < l->height ? high - l->pad_down : l->height,
                columns = wide - l->pad_along < l->width ? wide - l->pad_along : l->width;
  memset(room, 0, sizeof(float) * (size_t)lowrank_depthwise_room_float((const int64_t *)l));
  for (int64_t b = 0; b < l->samples; b++) {
    const int64_t at = b * l->channels;
    if (rows > 0 && columns > 0)
      side_by_side(l, (const float *)t->a + at * in, first, count, l->height, l->width, rows, columns,
                   x + LANES * (l->pad_down * wide + l->pad_along), wide);
    side_by_side(l, (const float *)t->bits + at * out, first, count, l->out_height, l->out_width, l->out_height,
                 l->out_width, grad, l->out_width);
    for (int64_t i = 0; i < places_down; i++)
      for (int64_t j = 0; j < places_along; j += AT_ONCE) {
        const float *from = x + LANES * (i * l->step_down * wide + j * l->step_along);
        float *to = sums + LANES * (i * places_along + j);
        switch (places_along - j) {
        case 1: places(l, from, grad, to, 1); break;
        case 2: places(l, from, grad, to, 2); break;
        case 3: places(l, from, grad, to, 3); break;
        case 4: places(l, from, grad, to, 4); break;
        case 5: places(l, from, grad, to, 5); break;
        default: places(l, from, grad, to, AT_ONCE);
        }
      }
  }
  float *to = (float *)t->out + first * places_down * places_along;
  for (int64_t c = 0; c < count; c++)
    for (int64_t i = 0; i < places_down * places_along; i++) *to++ = sums[LANES * i + c];
}

#define PIECE(name, target)                                                                                            \
  static target void name(const task *t, int64_t from, int64_t to) {                                                   \
    float *room = (float *)t->room + from / t->step * t->columns;                                                      \
    for (; from < to; from++) channels(t, from, room);                                                                 \
  }
PIECE(piece_plain, )
#if defined(__x86_64__)
PIECE(piece_avx2, __attribute__((target("avx2,fma"))))
PIECE(piece_avx512, __attribute__((target("avx512f"))))
#endif

/* out (C, K_h K_w) of x (B, C, H, W) and grad (B, C, H', W'), both with the channels last in memory or neither; room: `lowrank_depthwise_room_float` numbers for each
   thread; plan: a `layer`. */
void lowrank_depthwise_float(const float *x, float *grad, float *out, float *room, const int64_t *plan, int threads) {
  const layer *l = (const layer *)plan;
  const int64_t blocks = (l->channels + LANES - 1) / LANES,
                worth = l->samples * l->channels * l->out_height * l->out_width * l->kernel_height * l->kernel_width / WORK;
  if (worth < threads) threads = worth < 1 ? 1 : (int)worth;
  task t = {.piece = OF_WIDTH(piece), .a = x, .bits = grad, .b = plan, .out = out, .room = room, .count = blocks,
            .step = (blocks + threads - 1) / threads, .columns = lowrank_depthwise_room_float(plan)};
  lowrank_run(&t, threads);
}
