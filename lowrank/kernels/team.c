#include "team.h"

#include <string.h>

typedef void (*team_t)(void (*)(void *), void *, unsigned, unsigned);
static team_t team;

void lowrank_set_team(void *gomp_parallel) { memcpy(&team, &gomp_parallel, sizeof team); }

static void work(void *data) {
  task *t = data;
  for (;;) {
    int64_t from = atomic_fetch_add(&t->next, t->step), to = from + t->step;
    if (from >= t->count) return;
    t->piece(t, from, to < t->count ? to : t->count);
  }
}

void lowrank_run(task *t, int threads) {
  atomic_init(&t->next, 0);
  int64_t pieces = (t->count + t->step - 1) / t->step;
  if (pieces < threads) threads = (int)pieces;
  if (team && threads > 1)
    team(work, t, (unsigned)threads, 0);
  else
    work(t);
}

static int most_width = 16;

/* Vectors of more numbers are not used from here on, though the processor has them. */
void lowrank_set_width(int numbers) { most_width = numbers; }

int lowrank_width(void) {
#if defined(__x86_64__)
  if (most_width >= 16 && __builtin_cpu_supports("avx512f")) return 16;
  if (most_width >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}
