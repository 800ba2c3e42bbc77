/* One subspace iteration for each mode of a tensor in turn, see `lowrank.tensors.decompose`. Each reads the tensor that
   the modes ahead of it left twice: for X X^T start, where both products of a tile are made while it is in the cache,
   and to project on the basis. The first may do with the first read, keeping start^T X. */

#include <float.h>
#include <math.h>
#include <string.h>

#include "team.h"

#define PIECES 16          /* that threads share, at most: their number, and so the order of sums, is by shapes alone */
#define WORK 262144        /* multiplications that a piece is worth */
#define TILE 16384         /* numbers of a tile that is copied together */
#define READ_AT_ONCE 131072 /* numbers of a tile that is read where it lies */
#define NEAR 6144          /* numbers in the nearest cache */
#define PRODUCT 4096       /* numbers of the product of a tile and a start */
#define MOST_COLUMNS 128   /* of a start */
#define FEW_COLUMNS 8      /* of a start: of more, BLAS makes large products faster */
#define LARGE 4194304      /* multiplications of a large product */
#define LEAST (16 * FLT_EPSILON) /* of a sum of squares: less than that counts as nothing */
#define SMALL(r) (5 * (r) * (r) + (r)) /* numbers of s, R, a stack (2 r, r), its R, and a row */
enum way { TWICE, HELD, ONCE }; /* of `passes.subspace` */
#define LINE 16 /* numbers that come to the cache together */
typedef float four __attribute__((vector_size(16)));
typedef float loose __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t four_places __attribute__((vector_size(16)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (four_places){__VA_ARGS__})
#endif

struct tile_kernels {
  void (*project)(const float *x, int64_t stride, int64_t count, int64_t w, const float *s, int64_t r, float *out,
                  int add, int call);
  void (*correlate)(const float *x, int64_t stride, int64_t count, int64_t w, int64_t tiles, int64_t jump,
                    const float *z, int64_t r, float *out);
  void (*clear_overlap)(float *z, int64_t r, int64_t w);
  void (*arrange)(float *z, int64_t r, int64_t w, float *a, int64_t down, int64_t along, int into);
  int64_t width;
};

#define WIDTH 4
#define PARTS 3
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
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#define LOW 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH 2, 10, 3, 11, 6, 14, 7, 15
#define FIRST 0, 1, 8, 9, 4, 5, 12, 13
#define LAST 2, 3, 10, 11, 6, 7, 14, 15
#include "tile.h"

#define WIDTH 16
#define PARTS 4
#define TARGET __attribute__((target("avx512f")))
#define NAME(x) x##_avx512
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define FIRST 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define LAST 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#include "tile.h"
#endif

enum layout { LYING, COPIED, ROWS }; /* tiles read where they lie, copied together, and rows of the last mode */

/* A mode of a tensor, which is seen as (left, n, right), and what is done with it, tile by tile. */
typedef struct {
  const struct tile_kernels *with;
  const float *x, *s; /* s (n, r); of ROWS (r, n) in vectors, zero where they overlap */
  float *images;      /* one for each piece, or NULL */
  float *out;         /* the projected tensor (left, r, right), or NULL */
  int64_t left, n, right, r, tiles, pieces, image;
  int64_t together; /* of `left`, that are done at a time */
  int64_t blocks;   /* that rows are cut into */
  enum layout layout;
} view;

static int64_t padded(const view *v, int64_t w) { return (w + v->with->width - 1) / v->with->width * v->with->width; }

/* Of `tiles` x (n, w) at a stride, one a `jump` behind the other: `z` s^T x, each (r, w) in vectors. */
static void across(const view *v, const float *x, int64_t stride, int64_t w, int64_t tiles, int64_t jump, float *z) {
  for (int64_t t = 0; t < tiles; t++)
    v->with->project(x + t * jump, stride, v->n, w, v->s, v->r, z + t * v->r * padded(v, w), 0, 1);
}

/* And the image += x z^T. */
static void back(const view *v, const float *x, int64_t stride, int64_t w, int64_t tiles, int64_t jump, float *z,
                 float *image) {
  if (!image) return;
  v->with->clear_overlap(z, tiles * v->r, w);
  v->with->correlate(x, stride, v->n, w, tiles, jump, z, v->r, image);
}

static void lying(const view *v, int64_t index, float *z, float *image) {
  const int64_t r = v->r, block = index % v->blocks, first = index / v->blocks * v->together;
  const int64_t from = v->right * block / v->blocks, w = v->right * (block + 1) / v->blocks - from;
  const int64_t some = v->left - first < v->together ? v->left - first : v->together;
  const float *x = v->x + first * v->n * v->right + from;
  across(v, x, v->right, w, some, v->n * v->right, z);
  for (int64_t t = 0; v->out && t < some; t++)
    v->with->arrange(z + t * r * padded(v, w), r, w, v->out + (first + t) * r * v->right + from, v->right, 1, 1);
  back(v, x, v->right, w, some, v->n * v->right, z, image);
}

static void copied(const view *v, int64_t index, float *tile, float *z, float *image) {
  const int64_t n = v->n, right = v->right, first = index * v->together;
  const int64_t some = v->left - first < v->together ? v->left - first : v->together;
  const int64_t used = some * right, w = padded(v, used);
  const float *x = v->x + first * n * right;
  for (int64_t l = 0; l < some; l++)
    for (int64_t i = 0; i < n; i++)
      for (int64_t p = 0; p < right; p++) tile[i * w + l * right + p] = *x++;
  for (int64_t i = 0; used < w && i < n; i++) memset(tile + i * w + used, 0, sizeof(float) * (size_t)(w - used));
  across(v, tile, w, w, 1, 0, z);
  float *out = v->out + first * v->r * right;
  for (int64_t l = 0; v->out && l < some; l++)
    for (int64_t k = 0; k < v->r; k++)
      for (int64_t p = 0; p < right; p++) *out++ = z[k * w + l * right + p];
  back(v, tile, w, w, 1, 0, z, image);
}

static void rows(const view *v, int64_t index, float *z, float *image) {
  const int64_t n = v->n, r = v->r, first = index * v->together;
  const int64_t some = v->left - first < v->together ? v->left - first : v->together;
  const float *x = v->x + first * n;
  float *out = v->out ? v->out + first * r : z;
  memset(out, 0, sizeof(float) * (size_t)(some * r));
  v->with->correlate(x, n, some, n, 1, 0, v->s, r, out);
  if (image) v->with->project(x, n, some, n, out, r, image, 1, 0);
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
  const int64_t n = v->n, r = v->r, all = v->left * v->right, width = v->with->width;
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
  v->tiles = v->blocks * ((v->left + v->together - 1) / v->together);
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

static float inner(const float *a, const float *b, int64_t n) {
  float sums[8] = {0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) sums[j] += a[i + j] * b[i + j];
  for (; i < n; i++) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

static void reflect(const float *v, float tau, float *a, int64_t n) { /* v[0] counts as 1 */
  const float by = tau * (a[0] + inner(v + 1, a + 1, n - 1));
  a[0] -= by;
  for (int64_t i = 1; i < n; i++) a[i] -= by * v[i];
}

/* Q of the QR decomposition of a matrix whose columns lie one after the other, in its place: by Householder's
   reflections, with LAPACK's signs. And R (r, r), what is below its diagonal left out, if `upper` is not NULL. */
static void orthonormal(float *a, int64_t n, int64_t r, float *upper) {
  float taus[MOST_COLUMNS];
  for (int64_t k = 0; k < r; k++) {
    float *v = a + k * n + k;
    const int64_t length = n - k;
    double squares = 0;
    for (int64_t i = 1; i < length; i++) squares += (double)v[i] * v[i];
    taus[k] = 0;
    if (squares == 0) continue;
    /* In double precision, which the smallest numbers do not leave. */
    const double alpha = v[0], beta = -copysign(sqrt(alpha * alpha + squares), alpha), by = 1 / (alpha - beta);
    taus[k] = (float)((beta - alpha) / beta);
    for (int64_t i = 1; i < length; i++) v[i] = (float)(v[i] * by);
    for (int64_t j = k + 1; j < r; j++) reflect(v, taus[k], a + j * n + k, length);
    v[0] = (float)beta;
  }
  for (int64_t k = 0; upper && k < r; k++)
    for (int64_t j = k; j < r; j++) upper[k * r + j] = a[j * n + k];
  for (int64_t k = r - 1; k >= 0; k--) {
    float *v = a + k * n + k;
    for (int64_t j = k + 1; j < r; j++) a[j * n + k] = 0, reflect(v, taus[k], a + j * n + k, n - k);
    for (int64_t i = 1; i < n - k; i++) v[i] *= -taus[k];
    v[0] = 1 - taus[k];
    memset(a + k * n, 0, sizeof(float) * (size_t)k);
  }
}

/* start^T image, as the upper half of a matrix (2 r, r) whose columns lie one after the other, above what its trace has
   of rounding errors, on a diagonal. */
static void stack(const view *v, const float *start, const float *image, float *a) {
  const int64_t n = v->n, r = v->r;
  float trace = 0;
  memset(a, 0, sizeof(float) * (size_t)(2 * r * r));
  for (int64_t k = 0; k < r; k++) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < r; j++) a[2 * k * r + j] += start[i * r + j] * image[k * n + i];
    trace += a[2 * k * r + k];
  }
  for (int64_t k = 0; k < r; k++) a[2 * k * r + r + k] = LEAST * trace + FLT_MIN;
}

/* s (r, r), such that s^T z are the coordinates in the basis of x P, P being the projection on the rows of z = start^T x:
   R (start^T image)^-1, in least squares. */
static void coordinates(int64_t r, float *s) {
  float *upper = s + r * r, *a = upper + r * r, *right = a + 2 * r * r, *row = right + r * r;
  orthonormal(a, 2 * r, r, right);
  for (int64_t i = 0; i < r; i++) {
    memset(row, 0, sizeof(float) * (size_t)r);
    for (int64_t j = i; j < r; j++) {
      row[j] = upper[i * r + j];
      for (int64_t k = i; k < j; k++) row[j] -= row[k] * right[k * r + j];
      row[j] /= right[j * r + j];
    }
    for (int64_t k = 0; k < r; k++) {
      s[k * r + i] = 0;
      for (int64_t j = i; j < r; j++) s[k * r + i] += row[j] * a[2 * j * r + k];
    }
  }
}

/* basis = orth(X X^T start), (n, r). Where `z` is not NULL, start^T X into it, and into `s`, which is SMALL(r), what makes
   coordinates of it. */
static void iterate(view *v, const float *start, float *basis, float *z, float *s, float *scratch, int threads) {
  const int64_t n = v->n, r = v->r;
  float *images = scratch + v->image;
  for (int64_t i = 0; i < n * r; i++) basis[i] = isfinite(start[i]) ? start[i] : z && i / r == i % r;
  over_tiles(v, arranged(v, basis, scratch), images, z, threads);
  for (int64_t piece = 1; piece < v->pieces; piece++)
    for (int64_t i = 0; i < v->image; i++) images[i] += images[piece * v->image + i];
  if (v->layout == ROWS)
    v->with->arrange(images, r, n, scratch, n, 1, 1);
  else
    for (int64_t i = 0; i < n * r; i++) scratch[i % r * n + i / r] = images[i];
  if (z) stack(v, basis, scratch, s + 2 * r * r);
  orthonormal(scratch, n, r, z ? s + r * r : NULL);
  if (z) coordinates(r, s);
  for (int64_t k = 0; k < r; k++)
    for (int64_t i = 0; i < n; i++) basis[i * r + k] = scratch[k * n + i];
}

/* How each step sees the tensor, how what the first keeps of one read is seen, and the numbers that all of them need for
   their images, for small matrices of that, and for a tensor between two. */
typedef struct {
  view views[8], kept;
  int64_t images, small, between;
} course;

/* Those of the widest vectors that a row of so many numbers fills. */
static const struct tile_kernels *of_row(int64_t numbers) {
#if defined(__x86_64__)
  if (lowrank_width() == 16 && numbers < 16) return &kernels_avx2;
#endif
  (void)numbers;
  return &OF_WIDTH(kernels);
}

static int look_once(course *c, view seen) {
  const int64_t r = seen.r;
  seen.n = r, c->kept = seen;
  if (!cut(&c->kept)) return 0;
  c->small = SMALL(r) + c->kept.image, c->between = seen.left * r * seen.right;
  return 1;
}

static int look(course *c, const int64_t *plan) {
  const int64_t modes = plan[0], steps = plan[1 + modes], *step = plan + modes + 2;
  int64_t now[8];
  if (modes > 8 || steps > modes) return 0;
  memset(c, 0, sizeof *c);
  memcpy(now, plan + 1, sizeof(int64_t) * (size_t)modes);
  for (int64_t at = 0; at < steps; at++) {
    view *v = c->views + at;
    v->n = now[step[3 * at]], v->r = step[3 * at + 1], v->left = v->right = 1;
    for (int64_t m = 0; m < modes; m++)
      if (m != step[3 * at]) *(m < step[3 * at] ? &v->left : &v->right) *= now[m];
    now[step[3 * at]] = v->r;
    v->with = of_row(v->right == 1 ? v->n : v->right);
    if (!cut(v) || (step[3 * at + 2] == ONCE && (at || !look_once(c, *v)))) return 0;
    const int64_t images = (v->pieces + 1) * v->image, between = at + 1 < steps ? v->left * v->r * v->right : 0;
    if (c->images < images) c->images = images;
    if (c->between < between) c->between = between;
  }
  return 1;
}

/* `plan`: the number of modes, their sizes, the number of steps, and for each of these the mode, its rank, and the way, of
   which ONCE is the first step's alone. Returns the numbers of scratch that it takes, which the caller has from PyTorch, whose
   meters see them; -1 where it cannot be done. */
int64_t lowrank_subspace_room_float(const int64_t *plan) {
  course c;
  return look(&c, plan) ? c.images + c.small + 2 * c.between : -1;
}

/* `memory`: x, core, scratch, and for each step start and basis. */
void lowrank_subspace_float(const int64_t *plan, const int64_t *memory, int threads) {
  const int64_t steps = plan[1 + plan[0]], *step = plan + plan[0] + 2;
  course c;
  if (!look(&c, plan)) return;
  const float *x = (const float *)memory[0];
  float *scratch = (float *)memory[2], *small = scratch + c.images, *between = small + c.small;
  for (int64_t at = 0; at < steps; at++) {
    view *v = c.views + at;
    float *start = (float *)memory[3 + 2 * at], *basis = (float *)memory[4 + 2 * at];
    float *out = at + 1 < steps ? between + at % 2 * c.between : (float *)memory[1];
    v->x = x;
    if (step[3 * at + 2] == ONCE) {
      float *z = between + c.between, *room = small + SMALL(v->r);
      iterate(v, start, basis, z, small, scratch, threads);
      c.kept.x = z;
      over_tiles(&c.kept, arranged(&c.kept, small, room), NULL, out, threads);
    } else {
      if (step[3 * at + 2] == TWICE) iterate(v, start, basis, NULL, NULL, scratch, threads);
      over_tiles(v, arranged(v, basis, scratch), NULL, out, threads);
    }
    x = out;
  }
}
