/* Products of a tile with matrices of few rows or columns, see `tile.h`, made for each kind of processor. */

#include <stdint.h>

struct tile_kernels {
  void (*project)(const float *x, int64_t stride, int64_t count, int64_t w, const float *s, int64_t r, float *out,
                  int add, int64_t jump);
  void (*correlate)(const float *x, int64_t stride, int64_t count, int64_t w, int64_t tiles, int64_t jump,
                    const float *z, int64_t r, float *out);
  void (*clear_overlap)(float *z, int64_t r, int64_t w);
  void (*arrange)(float *z, int64_t r, int64_t w, float *a, int64_t down, int64_t along, int into);
  int64_t width;
};

/* Those of the widest vectors that a row of so many numbers fills; of four, where it fills none. */
const struct tile_kernels *lowrank_tiles_of(int64_t numbers);
