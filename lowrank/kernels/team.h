/* Threads: those of the OpenMP runtime that PyTorch has loaded, since a second runtime's would spin against them. */

#include <stdatomic.h>
#include <stdint.h>

typedef struct task task;
struct task {
  void (*piece)(const task *, int64_t from, int64_t to);
  const void *a, *b;
  void *out, *bits, *room;
  int64_t count, step, columns; /* step: that one thread takes at a time */
  double low, high;
  int rule;
  atomic_llong next;
};

void lowrank_run(task *t, int threads);

/* Numbers in a vector of the widest kind that the processor has and that may be used. */
int lowrank_width(void);

/* Of what is made for each kind of vectors, that of this processor. */
#if defined(__x86_64__)
#define OF_WIDTH(name)                                                                                                 \
  (*(lowrank_width() == 16 ? &name##_avx512 : lowrank_width() == 8 ? &name##_avx2 : &name##_plain))
#else
#define OF_WIDTH(name) name##_plain
#endif
