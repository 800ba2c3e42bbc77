#include "qr.h"

#include <math.h>
#include <string.h>

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

void lowrank_orthonormal(float *a, int64_t n, int64_t r) {
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
  for (int64_t k = r - 1; k >= 0; k--) {
    float *v = a + k * n + k;
    for (int64_t j = k + 1; j < r; j++) a[j * n + k] = 0, reflect(v, taus[k], a + j * n + k, n - k);
    for (int64_t i = 1; i < n - k; i++) v[i] *= -taus[k];
    v[0] = 1 - taus[k];
    memset(a + k * n, 0, sizeof(float) * (size_t)k);
  }
}
