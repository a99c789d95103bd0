// Attention of the prefix's queries to all tokens, forward: a block a query, whose groups of lanes take a key
// and its value each, 16 bytes a lane. Bound by memory, so without products on tensor cores.
#pragma once

#include "kernels/cuda/mma/tile.cuh"

namespace eva_attn::cuda::mma {

template <int kHeadDim_, int kWarps_>
struct PrefixFwdTraits {
    static constexpr int kHeadDim = kHeadDim_, kWarps = kWarps_, kThreads = kWarps * kWarpSize;
    static constexpr int kLanes = kHeadDim / 8; // of a row
    static constexpr int kGroups = kThreads / kLanes;
    static constexpr int kUnroll = 4; // keys that a group has under way

    // What a warp saw.
    struct Part {
        alignas(16) float output[kHeadDim];
        float maximum, sum;
    };
};

template <class S, class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    prefix_attention_fwd_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int kLanes = Traits::kLanes, kGroups = Traits::kGroups, kUnroll = Traits::kUnroll;
    __shared__ typename Traits::Part parts[Traits::kWarps];
    wait_for_dependencies();

    const Geometry& g = p.shape.geometry;
    const int tokens = static_cast<int>(g.num_tokens()), prefix = static_cast<int>(g.num_prefix_tokens);
    const int64_t bh = blockIdx.x / prefix, batch = bh / p.shape.heads, head = bh % p.shape.heads;
    const int query_token = blockIdx.x % prefix;
    const bool* const mask = p.key_padding_mask ? p.key_padding_mask + batch * tokens : nullptr;
    const bool is_padding = mask && mask[query_token];
    const int group = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;
    const bool inside = column < p.shape.head_dim;
    const auto column_of = [&](const Rows& rows, int token) {
        return head_rows<S>(rows, batch, head) + token * rows.token_stride + column;
    };

    const float scale = static_cast<float>(p.scale) * kLog2e;
    const Float8 query = unpack8<S>(load_streaming(column_of(p.query, query_token), inside && !is_padding));
    const uint64_t seed = p.dropout_seed ? static_cast<uint64_t>(*p.dropout_seed) : 0;

    // In units of log 2.
    float maximum = -kInfinity, sum = 0;
    Float8 output{};
    for (int base = 0; base < tokens && !is_padding; base += kUnroll * kGroups) { // of the whole block
        uint4 key[kUnroll], value[kUnroll];
        float logit[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int token = base + u * kGroups + group;
            const bool visible = token < tokens && !(mask && mask[token]);
            logit[u] = visible ? 0.0f : -kInfinity;
            key[u] = load_streaming(column_of(p.key, token), visible && inside);
            value[u] = load_streaming(column_of(p.value, token), visible && inside);
        }
        float largest = maximum;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Float8 k = unpack8<S>(key[u]);
            float dot = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) dot += query.x[i] * k.x[i];
            logit[u] += scale * lanes_sum<kLanes>(dot);
            largest = fmaxf(largest, logit[u]);
        }
        const float shift = largest == -kInfinity ? 0.0f : largest;
        const float rescale = exp2_approx(maximum - shift);
        maximum = largest;
        sum *= rescale;
#pragma unroll
        for (int i = 0; i < 8; ++i) output.x[i] *= rescale;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float weight = exp2_approx(logit[u] - shift);
            sum += weight;
            if (p.dropout.threshold > 0) {
                const int token = base + u * kGroups + group;
                const PhiloxWords words =
                    philox4x32_10(seed, token / 4, query_token, static_cast<uint32_t>(bh), 0);
                weight *= words.of(token) >= p.dropout.threshold ? static_cast<float>(p.dropout.scale) : 0.0f;
            }
            const Float8 v = unpack8<S>(value[u]);
#pragma unroll
            for (int i = 0; i < 8; ++i) output.x[i] += weight * v.x[i];
        }
    }

    // Brings sums to a common maximum, which is at least the own.
    const auto raise = [&](float to) {
        const float rescale = to == -kInfinity ? 0.0f : exp2_approx(maximum - to);
        maximum = to;
        sum *= rescale;
#pragma unroll
        for (int i = 0; i < 8; ++i) output.x[i] *= rescale;
    };
#pragma unroll
    for (int offset = kLanes; offset < kWarpSize; offset *= 2) {
        raise(fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset)));
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) output.x[i] += __shfl_xor_sync(0xffffffffu, output.x[i], offset);
    }
    if (threadIdx.x % kWarpSize < kLanes) {
        auto& part = parts[threadIdx.x / kWarpSize];
        *reinterpret_cast<Float8*>(part.output + column) = output;
        part.maximum = maximum;
        part.sum = sum;
    }
    __syncthreads();
    if (threadIdx.x >= kLanes || !inside) return;
#pragma unroll 1
    for (int i = 1; i < Traits::kWarps; ++i) {
        const auto& part = parts[i];
        raise(fmaxf(maximum, part.maximum));
        const float factor = maximum == -kInfinity ? 0.0f : exp2_approx(part.maximum - maximum);
        const Float8 term = *reinterpret_cast<const Float8*>(part.output + column);
        sum += factor * part.sum;
#pragma unroll
        for (int d = 0; d < 8; ++d) output.x[d] += factor * term.x[d];
    }
    const float factor = sum > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int d = 0; d < 8; ++d) output.x[d] *= factor;
    *reinterpret_cast<uint4*>(const_cast<S*>(column_of(p.output, query_token))) = pack8<S>(output);
    if (column == 0)
        static_cast<float*>(p.logsumexp)[bh * tokens + query_token] =
            sum > 0 ? (maximum + log2f(sum)) * kLn2 : kInfinity;
}

template <class S, int kHeadDim>
void launch_prefix_attention_fwd(const AttentionParams& p, cudaStream_t stream) {
    constexpr int kFewTokens = 512;
    const Geometry& g = p.shape.geometry;
    const int64_t blocks = p.shape.batch * p.shape.heads * g.num_prefix_tokens;
    if (blocks == 0) return;
    using Few = PrefixFwdTraits<kHeadDim, 4>;
    using Many = PrefixFwdTraits<kHeadDim, 16>;
    if (g.num_tokens() <= kFewTokens) {
        launch_dependent(prefix_attention_fwd_kernel<S, Few>, blocks, Few::kThreads, 0, stream, p);
    } else {
        launch_dependent(prefix_attention_fwd_kernel<S, Many>, blocks, Many::kThreads, 0, stream, p);
    }
}

} // namespace eva_attn::cuda::mma
