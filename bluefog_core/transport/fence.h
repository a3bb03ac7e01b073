// The two fences around bytes that a sender may take back while somebody reads them (a sequence
// lock): the sender marks, fences, writes; the reader reads, fences, looks at the mark.
#pragma once

#include <atomic>

namespace bluefog::transport {

#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wtsan"  // Not modelled; the bytes lie at different addresses anyway.
#endif
inline void FenceBeforeOverwrite() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void FenceAfterRead() { std::atomic_thread_fence(std::memory_order_acquire); }
#pragma GCC diagnostic pop

}  // namespace bluefog::transport
