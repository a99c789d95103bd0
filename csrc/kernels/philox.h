// Philox4x32-10, the counter-based generator behind attention dropout (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EVA_HOST_DEVICE __host__ __device__
#else
#define EVA_HOST_DEVICE
#endif

namespace eva_attn {

struct PhiloxWords {
    uint32_t word[4];

    // Word entry % 4, by choices and not by an index, which would put the words into local memory on a GPU.
    EVA_HOST_DEVICE uint32_t of(int entry) const {
        const uint32_t low = entry % 2 ? word[1] : word[0], high = entry % 2 ? word[3] : word[2];
        return entry % 4 < 2 ? low : high;
    }
};

EVA_HOST_DEVICE inline PhiloxWords philox4x32_10(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2,
                                                 uint32_t c3) {
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return PhiloxWords{{c0, c1, c2, c3}};
}

// Dropout of attention weights. The weight of (batch * heads + head, query, entry) is kept iff its word
// is at least `threshold` = ceil(p * 2^32); entries are key tokens, then landmarks.
struct Dropout {
    uint64_t seed;
    uint64_t threshold; // 0: nothing is dropped
    double scale;       // 1 / (1 - p)
};

} // namespace eva_attn
