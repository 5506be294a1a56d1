/* Preloaded into a program, lets it see a CPU with AVX2 and nothing newer.

   Libraries choose their kernels by the CPUID instruction. Linux can make CPUID fault (arch_prctl, on CPUs that list
   cpuid_fault in /proc/cpuinfo); the handler below runs it after all, and clears the bits of AVX-512, VNNI and AMX in
   what it answers. Everything then runs the kernels that it would run on such a CPU: real ones, at their real speed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_CPUID 0x1012
#define BIT(n) (1u << (n))

typedef int (*sigaction_type)(int, const struct sigaction *, struct sigaction *);
static sigaction_type real_sigaction;
static struct sigaction theirs; /* the program's own handler of SIGSEGV */

/* faulthandler and others take SIGSEGV for themselves: they get what is no CPUID */
int sigaction(int signal, const struct sigaction *new, struct sigaction *old) {
  if (!real_sigaction) real_sigaction = (sigaction_type)dlsym(RTLD_NEXT, "sigaction");
  if (signal != SIGSEGV) return real_sigaction(signal, new, old);
  if (old) *old = theirs;
  if (new) theirs = *new;
  return 0;
}

void (*signal(int signal, void (*handler)(int)))(int) {
  struct sigaction new, old;
  memset(&new, 0, sizeof new);
  new.sa_handler = handler;
  new.sa_flags = SA_RESTART;
  return sigaction(signal, &new, &old) ? SIG_ERR : old.sa_handler;
}

static void hide(uint32_t leaf, uint32_t subleaf, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d) {
  if (leaf != 7) return;
  if (subleaf == 0) {
    *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX512 F DQ IFMA ... */
    *c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                                 /* VBMI, VNNI, BITALG */
    *d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));              /* FP16, AMX */
  } else if (subleaf == 1) {
    *a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));  /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
    *d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19)); /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10 */
  }
}

static void on_fault(int signal, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *code = (const uint8_t *)registers[REG_RIP];
  if (code[0] != 0x0f || code[1] != 0xa2) {
    if (theirs.sa_flags & SA_SIGINFO && theirs.sa_sigaction) {
      theirs.sa_sigaction(signal, info, context);
      return;
    }
    real_sigaction(SIGSEGV, &theirs, NULL); /* fault again, in the program's own hands */
    return;
  }
  uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX];
  uint32_t a = leaf, b, c = subleaf, d;
  syscall(SYS_arch_prctl, ARCH_CPUID, 1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  syscall(SYS_arch_prctl, ARCH_CPUID, 0);
  hide(leaf, subleaf, &a, &b, &c, &d);
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction ours;
  memset(&ours, 0, sizeof ours);
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  real_sigaction = (sigaction_type)dlsym(RTLD_NEXT, "sigaction");
  real_sigaction(SIGSEGV, &ours, &theirs);
  if (syscall(SYS_arch_prctl, ARCH_CPUID, 0)) perror("hide_vnni: this CPU or kernel cannot make CPUID fault");
}
