// What a harness needs to run kernels on the emulation: device memory, and errors as text.
// What is emulated, and what is not, stands in include/cuda_runtime.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emu {

struct Settings {
    unsigned schedule;  // 0: threads and blocks in order, 1: backwards, else the seed of a random order
    uint32_t poison;    // what memory is filled with, word by word
    uint32_t slack;     // bytes behind memory of the pool that may be read
};

enum class Kind {
    buffer,  // ends, or with an odd schedule begins, at an unmapped page
    pool,    // as `buffer`, with Settings::slack behind it
    shared,
};

// Device memory, poisoned. `name` is what an error calls it.
void * allocate(const char * name, size_t size, Kind kind);
void free_pool(void * data);
void make_read_only(const void * data);

// Runs `work`, in which kernels may be launched; afterwards all device memory is gone. Returns the
// error, nullptr if there was none; it is valid until the next call.
const char * guarded(const Settings & settings, const std::function<void()> & work);

}  // namespace emu
