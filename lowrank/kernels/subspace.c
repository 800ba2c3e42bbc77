/* One subspace iteration for each mode of a tensor in turn, see `lowrank.tensors.decompose`. Each reads the tensor that
   the modes ahead of it left: all of it or a part for X X^T start, where both products of a tile are made while it is in
   the cache, and then all of it to project on the basis. */

#include <math.h>
#include <string.h>

#include "clamp.h"
#include "qr.h"
#include "team.h"
#include "tiles.h"

#define PIECES 16          /* that threads share, at most: their number, and so the order of sums, is by shapes alone */
#define WORK 262144        /* multiplications that a piece is worth */
#define TILE 16384         /* numbers of a tile that is copied together */
#define READ_AT_ONCE 131072 /* numbers of a tile that is read where it lies */
#define LINE 16 /* numbers that come to the cache together */
#define NEAR 6144          /* numbers in the nearest cache */
#define PRODUCT 4096       /* numbers of the product of a tile and a start */
#define FEW_COLUMNS 8      /* of a start: of more, BLAS makes large products faster */
#define LARGE 4194304      /* multiplications of a large product */
#define HELD 0 /* share of a step whose start is a basis, see `iterations.subspace` */
typedef float four __attribute__((vector_size(16)));
typedef float loose __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t four_places __attribute__((vector_size(16)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (four_places){__VA_ARGS__})
#endif

#define WIDTH 4
#define PARTS 3
#define MOST 3
#define TARGET
#define NAME(x) x##_plain
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define FIRST 0, 1, 4, 5
#define LAST 2, 3, 6, 7
#include "tile.h"

#if defined(__x86_64__)
#define WIDTH 8
#define PARTS 3
#define MOST 3
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#define LOW 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH 2, 10, 3, 11, 6, 14, 7, 15
#define FIRST 0, 1, 8, 9, 4, 5, 12, 13
#define LAST 2, 3, 10, 11, 6, 7, 14, 15
#include "tile.h"

#define WIDTH 16
#define PARTS 4
#define MOST 7
#define TARGET __attribute__((target("avx512f")))
#define NAME(x) x##_avx512
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define FIRST 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define LAST 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#include "tile.h"
#endif

enum layout { LYING, COPIED, ROWS }; /* tiles read where they lie, copied together, and rows of the last mode */

/* A mode of a tensor (parts, left, n, right), or of some of it, and what is done with it, tile by tile. Of a part the next
   of `left` is a `jump` behind, and the next row of n a `stride`. */
typedef struct {
  const struct tile_kernels *with;
  const float *x, *s; /* s (n, r); of ROWS (r, n) in vectors, zero where they overlap */
  float *images;      /* one for each piece, or NULL */
  float *out;         /* the projected tensor (left, r, right) of all there is, or NULL */
  int64_t parts, left, n, right, jump, stride, rest, share, turn, ahead, r;
  int64_t tiles, pieces, image;
  int64_t together; /* of `left`, that are done at a time */
  int64_t blocks;   /* that rows are cut into */
  enum layout layout;
  const task *clamp; /* whose limits each tile is clamped by ahead of all else, in its place; or NULL */
} view;

static int64_t padded(const view *v, int64_t w) { return (w + v->with->width - 1) / v->with->width * v->with->width; }

/* Of `tiles` x (n, w) at a stride, one a `jump` behind the other, and the next one `next` behind the last, or 0: `z` s^T x,
   each (r, w) in vectors. */
static void across(const view *v, const float *x, int64_t stride, int64_t w, int64_t tiles, int64_t jump, int64_t next,
                   float *z) {
  for (int64_t t = 0; t < tiles; t++)
    v->with->project(x + t * jump, stride, v->n, w, v->s, v->r, z + t * v->r * padded(v, w), 0,
                     t + 1 < tiles ? jump : next);
}

/* And the image += x z^T. */
static void back(const view *v, const float *x, int64_t stride, int64_t w, int64_t tiles, int64_t jump, float *z,
                 float *image) {
  if (!image) return;
  v->with->clear_overlap(z, tiles * v->r, w);
  v->with->correlate(x, stride, v->n, w, tiles, jump, z, v->r, image);
}

/* Where a part begins: of all there is, that is one; of every `share`-th of `rest`, or of the columns, of which those of
   every `-share`-th of `rest` are the same. And the number of `left` that it has. */
static const float *part(const view *v, int64_t index, int64_t *left) {
  const int64_t turns = v->share < 0 ? -v->share : v->share;
  const int64_t line = v->share < 0 ? index / turns : index, at = v->share < 0 ? index % turns : (index + v->turn) % turns;
  const float *x = v->x + (line * v->rest + at) * v->n * v->stride;
  *left = (v->rest - at + turns - 1) / turns;
  return v->share < 0 ? x + v->ahead + (line + at + v->turn) % turns * v->right : x;
}

/* What a tile has of `left`: the first and the number, or less than one; its numbers. */
static const float *tile_of(const view *v, int64_t index, int64_t *first, int64_t *some) {
  const int64_t groups = (v->left + v->together - 1) / v->together;
  int64_t left;
  const float *x = part(v, index / groups, &left);
  *first = index % groups * v->together;
  *some = left - *first < v->together ? left - *first : v->together;
  return x + *first * v->jump;
}

/* With bits, tiles lie one behind the other. */
static void clamp(const view *v, const float *x, int64_t some) {
  const int64_t plane = v->n * v->right, begin = x - v->x;
  if (v->clamp->bits) {
    lowrank_clamp_piece(v->clamp, begin, begin + some * plane);
    return;
  }
  for (int64_t t = 0; t < some; t++) lowrank_clamp_piece(v->clamp, begin + t * v->jump, begin + t * v->jump + plane);
}

static void lying(const view *v, int64_t index, float *z, float *image) {
  const int64_t r = v->r, block = index % v->blocks;
  const int64_t from = v->right * block / v->blocks, w = v->right * (block + 1) / v->blocks - from;
  int64_t first, some;
  const float *x = tile_of(v, index / v->blocks, &first, &some) + from;
  if (some < 1) return;
  if (v->clamp) clamp(v, x, some);
  across(v, x, v->stride, w, some, v->jump, block + 1 < v->blocks ? w : v->jump - from, z);
  for (int64_t t = 0; v->out && t < some; t++)
    v->with->arrange(z + t * r * padded(v, w), r, w, v->out + (first + t) * r * v->right + from, v->right, 1, 1);
  back(v, x, v->stride, w, some, v->jump, z, image);
}

static void copied(const view *v, int64_t index, float *tile, float *z, float *image) {
  const int64_t n = v->n, right = v->right;
  int64_t first, some;
  const float *x = tile_of(v, index, &first, &some);
  if (some < 1) return;
  const int64_t used = some * right, w = padded(v, used);
  for (int64_t l = 0; l < some; l++)
    for (int64_t i = 0; i < n; i++)
      for (int64_t p = 0; p < right; p++) tile[i * w + l * right + p] = x[l * v->jump + i * v->stride + p];
  for (int64_t i = 0; used < w && i < n; i++) memset(tile + i * w + used, 0, sizeof(float) * (size_t)(w - used));
  across(v, tile, w, w, 1, 0, 0, z);
  float *out = v->out + first * v->r * right;
  for (int64_t l = 0; v->out && l < some; l++)
    for (int64_t k = 0; k < v->r; k++)
      for (int64_t p = 0; p < right; p++) *out++ = z[k * w + l * right + p];
  back(v, tile, w, w, 1, 0, z, image);
}

static void rows(const view *v, int64_t index, float *z, float *image) {
  const int64_t n = v->n, r = v->r;
  int64_t first, some;
  const float *x = tile_of(v, index, &first, &some);
  if (some < 1) return;
  float *out = v->out ? v->out + first * r : z;
  memset(out, 0, sizeof(float) * (size_t)(some * r));
  v->with->correlate(x, v->jump, some, n, 1, 0, v->s, r, out);
  if (image) v->with->project(x, v->jump, some, n, out, r, image, 1, 0);
}

static void some_tiles(const task *t, int64_t from, int64_t to) {
  const view *v = t->a;
  _Alignas(64) float tile[TILE], z[PRODUCT];
  for (int64_t piece = from; piece < to; piece++) {
    float *image = v->images ? v->images + piece * v->image : NULL;
    if (image) memset(image, 0, sizeof(float) * (size_t)v->image);
    const int64_t end = v->tiles * (piece + 1) / v->pieces;
    for (int64_t index = v->tiles * piece / v->pieces; index < end; index++) {
      if (v->layout == LYING) lying(v, index, z, image);
      if (v->layout == COPIED) copied(v, index, tile, z, image);
      if (v->layout == ROWS) rows(v, index, z, image);
    }
  }
}

/* Whether the mode can be cut into tiles, and how. */
static int cut(view *v) {
  const int64_t n = v->n, r = v->r, all = v->parts * v->left * v->right, width = v->with->width;
  if (r > MOST_COLUMNS || n * width > TILE || all < 1 || (r > FEW_COLUMNS && all * n * r > LARGE)) return 0;
  v->image = r * padded(v, n);
  v->layout = v->right >= width ? LYING : v->right == 1 && n >= width ? ROWS : COPIED;
  int64_t columns = (v->layout == COPIED ? TILE : READ_AT_ONCE) / n;
  if (columns > PRODUCT / r) columns = PRODUCT / r;
  columns -= columns % width;
  v->blocks = 1;
  if (v->layout == LYING) { /* none narrower than a vector */
    const int64_t most = v->right / width;
    v->blocks = (v->right + columns - 1) / columns;
    if (v->blocks > most) v->blocks = most;
  }
  v->together = columns / v->right;
  if (v->layout == LYING && v->together * r * padded(v, v->right) > PRODUCT)
    v->together = PRODUCT / (r * padded(v, v->right));
  if (v->together < 1) v->together = 1;
  v->tiles = v->blocks * v->parts * ((v->left + v->together - 1) / v->together);
  v->pieces = all * n * r / WORK;
  v->pieces = v->pieces < 1 ? 1 : v->pieces > PIECES ? PIECES : v->pieces;
  if (v->pieces > v->tiles) v->pieces = v->tiles;
  return 1;
}

/* s^T x into `out`, x x^T s into `images`; NULL: not that. */
static void over_tiles(view *v, const float *s, float *images, float *out, int threads) {
  v->s = s, v->images = images, v->out = out;
  task t = {.piece = some_tiles, .a = v, .count = v->pieces, .step = 1};
  lowrank_run(&t, threads);
}

/* s (n, r) as the tiles take it; in `room`, if that is another way. */
static const float *arranged(const view *v, float *s, float *room) {
  if (v->layout != ROWS) return s;
  v->with->arrange(room, v->r, v->n, s, 1, v->r, 0);
  v->with->clear_overlap(room, v->r, v->n);
  return room;
}

/* Numbers in which no direction is favoured, see `decompose`. */
static float other(int64_t place) { return (float)cos((double)place * (double)place); }

static int is_zero(const float *a, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (a[i] != 0) return 0;
  return 1;
}

/* Whether a part has nothing but zeros. */
static int is_empty(const view *v) {
  for (int64_t index = 0; index < v->parts; index++) {
    int64_t left;
    const float *x = part(v, index, &left);
    for (int64_t l = 0; l < left; l++)
      for (int64_t i = 0; i < v->n; i++)
        if (!is_zero(x + l * v->jump + i * v->stride, v->right)) return 0;
  }
  return 1;
}

/* basis = orth(X X^T start), (n, r); where that is zero, from other numbers, or, of a part without any, from start. */
static void iterate(view *v, const float *start, float *basis, float *scratch, int threads) {
  const int64_t n = v->n, r = v->r;
  float *images = scratch + v->image;
  for (int64_t i = 0; i < n * r; i++) basis[i] = isfinite(start[i]) ? start[i] : other(i);
  over_tiles(v, arranged(v, basis, scratch), images, NULL, threads);
  for (int64_t piece = 1; piece < v->pieces; piece++)
    for (int64_t i = 0; i < v->image; i++) images[i] += images[piece * v->image + i];
  if (v->layout == ROWS)
    v->with->arrange(images, r, n, scratch, n, 1, 1);
  else
    for (int64_t k = 0; k < r; k++)
      for (int64_t i = 0; i < n; i++) scratch[k * n + i] = images[i * r + k];
  for (int64_t k = 0, kept = -1; k < r; k++)
    if (is_zero(scratch + k * n, n)) {
      if (kept < 0) kept = v->share != 1 && is_empty(v);
      for (int64_t i = 0; i < n; i++) scratch[k * n + i] = kept ? basis[i * r + k] : other(i * r + k);
    }
  lowrank_orthonormal(scratch, n, r);
  for (int64_t k = 0; k < r; k++)
    for (int64_t i = 0; i < n; i++) basis[i * r + k] = scratch[k * n + i];
}

/* How each step sees the tensor, and what of it is iterated; and the numbers that all of them need for their images and
   for a tensor between two. */
typedef struct {
  view views[8], iterated[8];
  int64_t images, between;
} course;

/* Those of the widest vectors that a row of so many numbers fills. */
static const struct tile_kernels *of_row(int64_t numbers) {
  return numbers < 8 ? lowrank_tiles_of(8) : lowrank_tiles_of(numbers);
}

const struct tile_kernels *lowrank_tiles_of(int64_t numbers) {
#if defined(__x86_64__)
  if (lowrank_width() >= 8 && numbers < 8) return &kernels_plain;
  if (lowrank_width() == 16 && numbers < 16) return &kernels_avx2;
#endif
  (void)numbers;
  return &OF_WIDTH(kernels);
}

/* Into `v`, whose mode, rest and share are set. */
static int see(course *c, view *v, int64_t left) {
  const int64_t turns = v->share < 0 ? -v->share : v->share;
  v->right = v->share < 0 ? v->stride / turns : v->stride;
  if (v->share == 1 || (v->share < 0 && v->rest == 1)) v->rest = left; /* the samples are what is in turn */
  v->parts = v->share == 1 ? 1 : left / v->rest * (v->share < 0 ? turns : 1);
  v->left = (v->rest + turns - 1) / turns; /* at most */
  v->jump = v->n * v->stride * turns;
  v->with = of_row(v->right == 1 ? v->n : v->right);
  if (!cut(v)) return 0;
  if (c->images < (v->pieces + 1) * v->image) c->images = (v->pieces + 1) * v->image;
  return 1;
}

static int look(course *c, const int64_t *plan) {
  const int64_t modes = plan[0], steps = plan[1 + modes], *step = plan + modes + 2;
  int64_t now[8];
  if (modes > 8 || steps > modes) return 0;
  memset(c, 0, sizeof *c);
  memcpy(now, plan + 1, sizeof(int64_t) * (size_t)modes);
  for (int64_t at = 0; at < steps; at++) {
    view *v = c->views + at, *some = c->iterated + at;
    int64_t left = 1;
    v->n = now[step[3 * at]], v->r = step[3 * at + 1], v->share = v->stride = v->rest = 1;
    for (int64_t m = 0; m < modes; m++)
      if (m != step[3 * at]) *(m < step[3 * at] ? &left : &v->stride) *= now[m];
    if (!see(c, v, left)) return 0;
    *some = *v, some->rest = left / now[0];
    if (step[3 * at + 2] != HELD) some->share = step[3 * at + 2];
    if (!see(c, some, left)) return 0;
    now[step[3 * at]] = v->r;
    const int64_t between = at + 1 < steps ? left * v->r * v->stride : 0;
    if (c->between < between) c->between = between;
  }
  return 1;
}

/* `plan`: the number of modes, their sizes, the number of steps, and for each of these the mode, its rank, and the
   share. Returns the numbers of scratch that it takes, which the caller has from PyTorch, whose meters see them; -1 where
   it cannot be done. */
int64_t lowrank_subspace_room_float(const int64_t *plan) {
  course c;
  return look(&c, plan) ? c.images + 2 * c.between : -1;
}

/* `memory`: x, core, scratch, and for each step start and basis, and of its part the turn and what is ahead of it. */
void lowrank_subspace_float(const int64_t *plan, const int64_t *memory, int threads) {
  const int64_t steps = plan[1 + plan[0]], *step = plan + plan[0] + 2;
  course c;
  if (!look(&c, plan)) return;
  const float *x = (const float *)memory[0];
  float *scratch = (float *)memory[2], *between = scratch + c.images;
  for (int64_t at = 0; at < steps; at++) {
    view *v = c.views + at, *iterated = c.iterated + at;
    const int64_t *own = memory + 3 + 4 * at;
    float *start = (float *)own[0], *basis = (float *)own[1];
    float *out = at + 1 < steps ? between + at % 2 * c.between : (float *)memory[1];
    iterated->x = v->x = x, iterated->turn = own[2], iterated->ahead = own[3];
    if (step[3 * at + 2] != HELD) iterate(iterated, start, basis, scratch, threads);
    over_tiles(v, arranged(v, basis, scratch), NULL, out, threads);
    x = out;
  }
}

/* Whether the one step of a tensor that is still to be clamped can be made in the pass that clamps it: its tiles are whole
   planes and begin where a byte of bits does, and those that the basis is iterated on are few. They are clamped twice,
   which changes neither them nor their bits. */
static int look_clamped(course *c, const int64_t *plan) {
  if (plan[1 + plan[0]] != 1 || !look(c, plan)) return 0;
  view *all = c->views;
  const view *some = c->iterated;
  if (all->layout != LYING || all->blocks != 1 || some->layout != LYING || some->blocks != 1 || some->share < 2) return 0;
  if (all->together > 8) all->together -= all->together % 8;
  all->tiles = (all->left + all->together - 1) / all->together;
  if (all->pieces > all->tiles) all->pieces = all->tiles;
  return all->together * all->n * all->right % 8 == 0 || all->tiles == 1;
}

/* Returns as `lowrank_subspace_room_float`. */
int64_t lowrank_clamped_room_float(const int64_t *plan) {
  course c;
  return look_clamped(&c, plan) ? c.images : -1;
}

/* `memory`: x, what the step leaves, scratch, start, basis, the turn of its part and what is ahead of that, and bits. */
void lowrank_clamped_float(const int64_t *plan, const int64_t *memory, int rule, double low, double high, int threads) {
  course c;
  if (!look_clamped(&c, plan)) return;
  float *x = (float *)memory[0], *scratch = (float *)memory[2], *basis = (float *)memory[4];
  const task alone = {.a = x, .out = x, .low = low, .high = high, .rule = rule};
  const task packed = {.a = x, .out = x, .low = low, .high = high, .rule = rule, .bits = (uint8_t *)memory[7]};
  view *all = c.views, *some = c.iterated;
  some->x = all->x = x, some->turn = memory[5], some->ahead = memory[6];
  some->clamp = &alone, all->clamp = &packed;
  iterate(some, (const float *)memory[3], basis, scratch, threads);
  over_tiles(all, basis, NULL, (float *)memory[1], threads);
}
