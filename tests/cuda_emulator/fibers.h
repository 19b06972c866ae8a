// Fibers: threads of control inside one OS thread, which switch to each other by hand.
//
// On x86-64 a switch is a dozen instructions of our own. Elsewhere, and with EMULATOR_UCONTEXT
// defined, it is swapcontext of the C library, which works on any POSIX system and is several times
// slower. AddressSanitizer and ThreadSanitizer are told of every switch: to them a fiber is a stack
// and a thread of its own.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// For functions of the emulator itself. What they do is no work of a CUDA thread, and
// ThreadSanitizer must not see it as such.
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_UNSEEN
#endif

namespace emulator {

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)

/// A suspended thread of control: its stack pointer, with the saved registers above it.
using Context = void*;

extern "C" void emulator_switch(Context* save, Context load);
asm(R"(.text
.weak emulator_switch
emulator_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp, (%rdi); movq %rsi, %rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 popq %rcx; jmp *%rcx
)");

EMULATOR_UNSEEN inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  const auto top = reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t{15};
  auto** p = reinterpret_cast<void**>(top - 8);  // aligned as behind a call
  *--p = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  context = p;
}

EMULATOR_UNSEEN inline void switch_context(Context& from, Context& to) {
  emulator_switch(&from, to);
}

#else

using Context = ucontext_t;

EMULATOR_UNSEEN inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  makecontext(&context, entry, 0);
}

EMULATOR_UNSEEN inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

class Fiber {
 public:
  /// A fiber that begins with `entry`, which must never return, when it is entered for the first
  /// time.
  explicit Fiber(void (*entry)()) : stack_(new char[kStackBytes]) {
    prepare(context_, stack_.get(), kStackBytes, entry);
#if defined(__SANITIZE_THREAD__)
    sanitizer_fiber_ = __tsan_create_fiber(0);
#endif
  }

  /// Runs the fiber until it leaves. Called by the scheduler.
  EMULATOR_UNSEEN void enter() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack_.get(), kStackBytes);
#elif defined(__SANITIZE_THREAD__)
    scheduler_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(sanitizer_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(scheduler_context, context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  /// Back to the scheduler, until the fiber is entered again. Called by the fiber.
  EMULATOR_UNSEEN void leave() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_bytes);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(context_, scheduler_context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
  }

  /// The first thing that `entry` calls.
  EMULATOR_UNSEEN static void begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10;

  std::unique_ptr<char[]> stack_;
  Context context_;
  inline static Context scheduler_context;
#if defined(__SANITIZE_ADDRESS__)
  inline static const void* scheduler_stack;
  inline static size_t scheduler_stack_bytes;
#elif defined(__SANITIZE_THREAD__)
  void* sanitizer_fiber_;  // lives as long as the process
  inline static void* scheduler_fiber;
#endif
};

}  // namespace emulator
