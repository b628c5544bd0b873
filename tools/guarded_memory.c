// For tools/stock_faults.py, by LD_PRELOAD. Each aligned allocation (torch's tensors and oneDNN's scratchpads are such)
// ends at an inaccessible page and starts full of NaN. So an access past its end stops the process at that instruction,
// and a read of memory that was never written gives NaN.
//
// Because of the alignment, a few bytes may remain between its end and the page. They are compared when it is freed.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void __libc_free(void*);
extern void* __libc_memalign(size_t, size_t);

enum { PAGE = 4096, FILL = 0xFF };

typedef struct {
  char* begin;
  size_t length, size;
} Block;

// Addresses are not reused, so that freed memory stays inaccessible.
static const size_t ARENA = (size_t)1 << 42;
static char *arena, *next;
static unsigned count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int is_guarded(const void* p) {
  return arena != NULL && (char*)p >= arena && (char*)p < arena + ARENA;
}

// The data about a block is in the page before it, which is readable only during a call of these functions.
static Block* header(char* begin) { return (Block*)(begin - PAGE); }

int posix_memalign(void** out, size_t alignment, size_t size) {
  size_t length = (size + PAGE - 1) / PAGE * PAGE;
  if (alignment > PAGE || size == 0) {
    *out = __libc_memalign(alignment, size);
    return *out == NULL ? ENOMEM : 0;
  }
  pthread_mutex_lock(&mutex);
  if (arena == NULL) {
    arena = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) abort();
    next = arena;
  }
  char* begin = next + PAGE;
  int odd = count++ & 1;
  next = begin + length + PAGE;
  pthread_mutex_unlock(&mutex);
  if (next >= arena + ARENA || mprotect(begin - PAGE, length + PAGE, PROT_READ | PROT_WRITE))
    return ENOMEM;
  memset(begin, FILL, length);
  char* p = begin + (length - size) / alignment * alignment;
  // oneDNN aligns buffers within its scratchpad again, and reserves room for that. Every second time it needs that
  // room.
  if (odd && p - begin >= (ptrdiff_t)alignment) p -= alignment;
  *header(begin) = (Block){begin, length, size};
  // free() finds the block only from a pointer within its first page.
  if (p - begin >= PAGE) abort();
  mprotect(begin - PAGE, PAGE, PROT_NONE);
  *out = p;
  return 0;
}

void free(void* pointer) {
  if (!is_guarded(pointer)) {
    __libc_free(pointer);
    return;
  }
  char* p = pointer;
  char* begin = arena + (p - arena) / PAGE * PAGE;
  mprotect(begin - PAGE, PAGE, PROT_READ | PROT_WRITE);
  Block block = *header(begin);
  for (char* c = begin; c < begin + block.length; c++) {
    if (c == p) c += block.size;
    if (c < begin + block.length && *(unsigned char*)c != FILL) {
      static const char text[] = "guarded_memory: written past its end\n";
      ssize_t ignored = write(2, text, sizeof text - 1);
      (void)ignored;
      abort();
    }
  }
  // The pages go back to the system; the addresses do not.
  mmap(begin - PAGE, block.length + PAGE, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
