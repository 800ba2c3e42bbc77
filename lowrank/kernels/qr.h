#include <stdint.h>

#define MOST_COLUMNS 128

/* Q of the QR decomposition of a matrix whose columns lie one after the other, in its place: by Householder's
   reflections, with LAPACK's signs. */
void lowrank_orthonormal(float *a, int64_t n, int64_t r);
