/* Weight gradients of convolutions of two dimensions from the Tucker form of their input, see
   `lowrank.tensors.gradients`: the output's gradient is read once, and what is left of it is met with the core while it
   is small. A column of ones beside a factor makes the bias gradient in the same read. */

#include <string.h>

#include "team.h"
#include "tiles.h"

#define GROUP 8      /* outputs that are made together */
#define WORK 262144  /* multiplications that a thread is worth */

void lowrank_project_float(const float *x, const float *s, float *out, int64_t n, int64_t m, int64_t r, int threads);

/* SPREAD: the batch is projected, and the core spread over the positions. SAMPLES and IMAGES: all is projected, the batch
   or the images ahead. ROWS: the batch is, and images down, as each place of the kernel meets them, and the core is
   spread along; of a group for each channel. WINDOWS: all is, as each place meets it, and returned. */
enum kind { SPREAD, SAMPLES, IMAGES, ROWS, WINDOWS };
/* Where the batch has no factor, the gradient is what is left of it; then IMAGES is SAMPLES. */

/* `height` and `width` of the output, `full` of the input, `inputs` the channels of the core, or with ROWS and a factor
   those of the layer. */
typedef struct {
  int64_t kind, samples, outputs, height, width, ranks[4], full[2], kernel[2], stride[2], pad[2], dilation[2], factored,
      whole, begun; /* the channels with ROWS; not the batch; and what is left of the gradient is given */
} layer;

/* Where things lie in the scratch memory: columns and vectors of the two sides of an image, of the batch; what is left
   of the gradient, and of its images; the core, as it is met; and of each thread. */
typedef struct {
  const layer *l;
  const struct tile_kernels *with;
  int64_t down, along, place, row, core, ones; /* columns of each side, positions, in vectors, numbers of the core */
  int64_t at_down, at_along, at_vectors, at_batch, at_left, at_images, at_core, at_own, own, numbers;
} room;

static int64_t padded(const struct tile_kernels *with, int64_t w) { return (w + with->width - 1) / with->width * with->width; }

static int threads_of(const layer *l, int threads) {
  const int64_t worth = l->samples * l->outputs * l->height * l->width * 8 / WORK;
  return worth < threads ? worth < 1 ? 1 : (int)worth : threads;
}

static int look(room *m, const layer *l, int threads) {
  const int64_t *r = l->ranks, place = l->height * l->width, left = r[0] + 1;
  memset(m, 0, sizeof *m);
  m->l = l, m->place = place;
  m->ones = l->kind == SAMPLES || l->kind == IMAGES;
  m->down = r[2] * l->kernel[0] + m->ones, m->along = r[3] * l->kernel[1] + m->ones;
  const int64_t narrowest = l->kind == SPREAD ? place : l->width;
  if (narrowest < 4 || (m->ones && r[0] * r[2] * r[3] < 4)) return 0; /* no vector */
  m->with = lowrank_tiles_of(narrowest);
  m->row = padded(m->with, narrowest);
  int64_t at = 0;
#define TAKEN(name, count) m->at_##name = at, at += ((count) + 15) / 16 * 16 + 16
  TAKEN(down, l->height * m->down);
  TAKEN(along, l->width * m->along);
  TAKEN(vectors, m->along * m->row);
  TAKEN(batch, l->whole ? 0 : l->samples * left);
  TAKEN(left, l->kind == IMAGES || l->whole || l->begun ? 0 : left * l->outputs * place);
  TAKEN(images, l->kind == IMAGES ? l->samples * l->outputs * m->down * m->along
                : l->kind == SAMPLES ? left * l->outputs * m->down * m->along : 0);
  m->core = l->kind == SPREAD ? r[0] * r[1] * m->row : l->kind == ROWS ? (r[0] * r[2] * r[3] + 15) / 16 * 16 : r[0] * r[2] * r[3];
  TAKEN(core, l->kind == SPREAD ? m->core + r[1] * place : r[1] * padded(lowrank_tiles_of(m->core), m->core) + m->core);
  m->own = l->kind == ROWS     ? m->core + 32 + r[0] * m->row * (m->down + r[2] * l->kernel[1])
           : l->kind == SPREAD ? r[2] * l->width
                               : GROUP * m->core + m->down * m->row;
  m->own = (m->own + 15) / 16 * 16 + 16;
  TAKEN(own, threads_of(l, threads) * m->own);
#undef TAKEN
  m->numbers = at;
  return 1;
}

/* What each place of the kernel meets at each output position of a factor (n, r): (n', k r), zeros beside the input; and
   a column of ones. */
static void meet(const layer *l, int side, const float *factor, int64_t places, int64_t ones, float *out) {
  const int64_t r = l->ranks[2 + side];
  for (int64_t p = 0; p < places; p++) {
    for (int64_t k = 0; k < l->kernel[side]; k++, out += r) {
      const int64_t from = p * l->stride[side] + k * l->dilation[side] - l->pad[side];
      if (from >= 0 && from < l->full[side])
        memcpy(out, factor + from * r, sizeof(float) * (size_t)r);
      else
        memset(out, 0, sizeof(float) * (size_t)r);
    }
    if (ones) *out++ = 1;
  }
}

static float total(const float *x, int64_t n) {
  float sums[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) sums[j] += x[i + j];
  for (; i < n; i++) sums[i % 16] += x[i];
  for (int j = 8; j; j /= 2)
    for (int k = 0; k < j; k++) sums[k] += sums[k + j];
  return sums[0];
}

typedef struct {
  const room *m;
  const float *x, *channels; /* the gradient, or what is left of it */
  float *scratch, *out, *bias;
} work;

/* down^T x along of an image x. */
static void image(const work *k, const float *x, float *own, float *out) {
  const room *m = k->m;
  m->with->project(x, m->l->width, m->l->height, m->l->width, k->scratch + m->at_down, m->down, own, 0, m->place);
  memset(out, 0, sizeof(float) * (size_t)(m->down * m->along));
  m->with->correlate(own, m->row, m->down, m->row, 1, 0, k->scratch + m->at_vectors, m->along, out);
}

static void some_images(const task *t, int64_t from, int64_t to) {
  const work *k = t->a;
  const room *m = k->m;
  float *own = k->scratch + m->at_own + from / t->step * m->own;
  for (; from < to; from++) image(k, k->x + from * m->place, own, (float *)t->out + from * m->down * m->along);
}

/* The core over the positions: r0 matrices (r1, H' W') in vectors. */
static void spread(const work *k, const float *core) {
  const room *m = k->m;
  const layer *l = m->l;
  const int64_t *r = l->ranks;
  const float *down = k->scratch + m->at_down, *along = k->scratch + m->at_along;
  float *out = k->scratch + m->at_core, *flat = out + m->core, *rows = k->scratch + m->at_own;
  for (int64_t b = 0; b < r[0]; b++) {
    for (int64_t c = 0; c < r[1]; c++, core += r[2] * r[3]) {
      for (int64_t w = 0; w < l->width; w++)
        for (int64_t i = 0; i < r[2]; i++) {
          float sum = 0;
          for (int64_t j = 0; j < r[3]; j++) sum += core[i * r[3] + j] * along[w * r[3] + j];
          rows[i * l->width + w] = sum;
        }
      for (int64_t h = 0; h < l->height; h++) {
        float *to = flat + c * m->place + h * l->width;
        memset(to, 0, sizeof(float) * (size_t)l->width);
        for (int64_t i = 0; i < r[2]; i++)
          for (int64_t w = 0; w < l->width; w++) to[w] += down[h * r[2] + i] * rows[i * l->width + w];
      }
    }
    m->with->arrange(out + b * r[1] * m->row, r[1], m->place, flat, m->place, 1, 0);
    m->with->clear_overlap(out + b * r[1] * m->row, r[1], m->place);
  }
}

/* The bias gradient of an output, where no column of ones beside the images makes it. */
static float bias_of(const work *k, int64_t o) {
  const room *m = k->m;
  const layer *l = m->l;
  const float *x = k->x + o * m->place;
  if (!l->whole) return total(x + l->ranks[0] * l->outputs * m->place, m->place);
  float sum = 0;
  for (int64_t b = 0; b < l->samples; b++) sum += total(x + b * l->outputs * m->place, m->place);
  return sum;
}

static void outputs_of_spread(const task *t, int64_t from, int64_t to) {
  const work *k = t->a;
  const room *m = k->m;
  const layer *l = m->l;
  from *= GROUP, to *= GROUP;
  if (to > l->outputs) to = l->outputs;
  float *out = k->out + from * l->ranks[1];
  memset(out, 0, sizeof(float) * (size_t)((to - from) * l->ranks[1]));
  m->with->correlate(k->x + from * m->place, m->place, to - from, m->place, l->ranks[0], l->outputs * m->place,
                     k->scratch + m->at_core, l->ranks[1], out);
  for (; from < to; from++) k->bias[from] = bias_of(k, from);
}

/* The core (r1, r0 r2 r3) in vectors. */
static void by_channel(const work *k, const float *core) {
  const room *m = k->m;
  const int64_t *r = m->l->ranks, some = r[2] * r[3];
  const struct tile_kernels *with = lowrank_tiles_of(m->core);
  float *out = k->scratch + m->at_core, *flat = out + r[1] * padded(with, m->core);
  for (int64_t c = 0; c < r[1]; c++) {
    for (int64_t b = 0; b < r[0]; b++) memcpy(flat + b * some, core + (b * r[1] + c) * some, sizeof(float) * (size_t)some);
    with->arrange(out + c * padded(with, m->core), 1, m->core, flat, m->core, 1, 0);
  }
  with->clear_overlap(out, r[1], m->core);
}

/* What is left of the images of an output, (r0, r2 r3), and its bias gradient. */
static float left_of(const work *k, int64_t o, float *out) {
  const room *m = k->m;
  const layer *l = m->l;
  const int64_t *r = l->ranks, size = m->down * m->along, step = l->outputs * size;
  const float *x = k->scratch + m->at_images + o * size, *batch = k->scratch + m->at_batch;
  const int64_t last = size - 1;
  float bias = 0;
  if (l->kind == IMAGES) memset(out, 0, sizeof(float) * (size_t)m->core);
  for (int64_t b = 0; b < (l->kind == IMAGES ? l->samples : r[0]); b++, x += step) {
    if (l->kind == IMAGES || l->whole) bias += x[last];
    for (int64_t to = 0; to < (l->kind == IMAGES ? r[0] : 1); to++)
      for (int64_t i = 0; i < r[2]; i++)
        for (int64_t j = 0; j < r[3]; j++) {
          const int64_t place = i * r[3] + j;
          if (l->kind == IMAGES)
            out[to * r[2] * r[3] + place] += batch[b * (r[0] + 1) + to] * x[i * m->along + j];
          else
            out[b * r[2] * r[3] + place] = x[i * m->along + j];
        }
  }
  return l->kind == IMAGES || l->whole ? bias : x[last];
}

static void outputs_of_images(const task *t, int64_t from, int64_t to) {
  const work *k = t->a;
  const room *m = k->m;
  const layer *l = m->l;
  const struct tile_kernels *with = lowrank_tiles_of(m->core);
  float *own = k->scratch + m->at_own + from / t->step * m->own;
  for (; from < to; from++) {
    const int64_t first = from * GROUP, count = l->outputs - first < GROUP ? l->outputs - first : GROUP;
    for (int64_t o = 0; o < count; o++) k->bias[first + o] = left_of(k, first + o, own + o * m->core);
    float *out = k->out + first * l->ranks[1];
    memset(out, 0, sizeof(float) * (size_t)(count * l->ranks[1]));
    with->correlate(own, m->core, count, m->core, 1, 0, k->scratch + m->at_core, l->ranks[1], out);
  }
}

/* The core (r1, r0 r3 r2), each row to a multiple of vectors. */
static void turned(const work *k, const float *core) {
  const room *m = k->m;
  const int64_t *r = m->l->ranks;
  float *out = k->scratch + m->at_core;
  memset(out, 0, sizeof(float) * (size_t)(r[1] * m->core));
  for (int64_t b = 0; b < r[0]; b++)
    for (int64_t c = 0; c < r[1]; c++)
      for (int64_t i = 0; i < r[2]; i++)
        for (int64_t j = 0; j < r[3]; j++) out[c * m->core + (b * r[3] + j) * r[2] + i] = *core++;
}

static void channels_of_rows(const task *t, int64_t from, int64_t to) {
  const work *k = t->a;
  const room *m = k->m;
  const layer *l = m->l;
  const int64_t *r = l->ranks, size = r[2] * m->row, places = l->kernel[0] * l->kernel[1];
  float *own = k->scratch + m->at_own + from / t->step * m->own, *spread_out = own + m->core + 16,
        *down = spread_out + r[0] * l->kernel[1] * size;
  for (; from < to; from++) {
    const float *core = k->scratch + m->at_core + (l->factored ? 0 : from * m->core);
    if (l->factored) {
      lowrank_tiles_of(16)->project(core, m->core, r[1], m->core, k->channels + from * r[1], 1, own, 0, 0);
      core = own;
    }
    const float *x = k->x + from * m->place;
    for (int64_t b = 0; b < r[0]; b++) {
      for (int64_t i = 0; i < l->kernel[1]; i++)
        m->with->project(k->scratch + m->at_vectors + i * r[3] * m->row, m->row, r[3], m->row, core + b * r[3] * r[2], r[2],
                         spread_out + (b * l->kernel[1] + i) * size, 0, 0);
      const int64_t at = b * l->outputs * m->place, next = b + 1 < r[0] ? l->outputs * m->place : m->place - at;
      m->with->project(x + at, l->width, l->height, l->width, k->scratch + m->at_down, m->down,
                       down + b * m->down * m->row, 0, next);
    }
    memset(k->out + from * places, 0, sizeof(float) * (size_t)places);
    m->with->correlate(down, size, l->kernel[0], size, r[0], m->down * m->row, spread_out, l->kernel[1],
                       k->out + from * places);
    k->bias[from] = bias_of(k, from);
  }
}

static void over(void (*piece)(const task *, int64_t, int64_t), const work *k, int64_t count, float *out, int threads) {
  task t = {.piece = piece, .a = k, .out = out, .count = count, .step = (count + threads - 1) / threads};
  lowrank_run(&t, threads);
}

/* Numbers of scratch that `plan`, a `layer`, takes, which the caller has from PyTorch, whose meters see them; -1 where it
   cannot be done. */
int64_t lowrank_contract_room_float(const int64_t *plan, int threads) {
  room m;
  return look(&m, (const layer *)plan, threads) ? m.numbers : -1;
}

/* `memory`: the output's gradient; factors of batch, if there is one, channels (with ROWS), height and width; the core; scratch; the weight
   gradient (O, r1) against the core's channels, with ROWS (C, K_h K_w), with WINDOWS what is left of the gradient,
   (r0, O, K_h r2, K_w r3); the bias gradient (O,); where it is begun, the product of the batch's factor, beside which
   there is a column of ones, and the gradient, (r0 + 1, O, H', W'). */
void lowrank_contract_float(const int64_t *plan, const int64_t *memory, int threads) {
  const layer *l = (const layer *)plan;
  room m;
  if (!look(&m, l, threads)) return;
  float *scratch = (float *)memory[6], *batch = scratch + m.at_batch;
  const float *grad = (const float *)memory[0], *samples = (const float *)memory[1], *core = (const float *)memory[5];
  const int64_t left = l->ranks[0] + 1, images = l->outputs * (l->kind == IMAGES ? l->samples : l->kind == SAMPLES && !l->whole ? left : left - 1);
  work k = {.m = &m, .x = grad, .channels = (const float *)memory[2], .scratch = scratch, .out = (float *)memory[7],
            .bias = (float *)memory[8]};
  const int64_t groups = (l->outputs + GROUP - 1) / GROUP;
  const int all = threads;
  threads = threads_of(l, threads);
  for (int64_t b = 0; b < l->samples && !l->whole; b++) {
    memcpy(batch + b * left, samples + b * (left - 1), sizeof(float) * (size_t)(left - 1));
    batch[b * left + left - 1] = 1;
  }
  meet(l, 0, (const float *)memory[3], l->height, m.ones, scratch + m.at_down);
  meet(l, 1, (const float *)memory[4], l->width, m.ones, scratch + m.at_along);
  if (l->kind != SPREAD) {
    m.with->arrange(scratch + m.at_vectors, m.along, l->width, scratch + m.at_along, 1, m.along, 0);
    m.with->clear_overlap(scratch + m.at_vectors, m.along, l->width);
  }
  if (l->begun)
    k.x = (const float *)memory[9];
  else if (l->kind != IMAGES && !l->whole) {
    k.x = scratch + m.at_left;
    lowrank_project_float(grad, batch, scratch + m.at_left, l->samples, l->outputs * m.place, left, all);
  }
  if (l->kind == SPREAD) spread(&k, core), over(outputs_of_spread, &k, groups, NULL, threads);
  if (l->kind == SAMPLES || l->kind == IMAGES) {
    by_channel(&k, core);
    over(some_images, &k, images, scratch + m.at_images, threads);
    over(outputs_of_images, &k, groups, NULL, threads);
  }
  if (l->kind == ROWS) turned(&k, core), over(channels_of_rows, &k, l->outputs, NULL, threads);
  if (l->kind == WINDOWS) {
    over(some_images, &k, images, k.out, threads);
    for (int64_t o = 0; o < l->outputs; o++) k.bias[o] = bias_of(&k, o);
  }
}
