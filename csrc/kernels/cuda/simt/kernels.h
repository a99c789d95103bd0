// The launches of one dtype; each is instantiated in a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/params.h"

namespace eva_attn::cuda::simt {

template <class S>
struct Kernels {
    static void chunk_summary_fwd(const SummaryParams&, cudaStream_t);
    static void chunk_summary_bwd(const SummaryParams&, cudaStream_t);
    static void chunk_terms(const TermsParams&, cudaStream_t);
    static void window_attention_fwd(const AttentionParams&, cudaStream_t);
    static void window_attention_bwd_global(const AttentionParams&, cudaStream_t);
    static void window_attention_bwd(const AttentionParams&, cudaStream_t);
};

} // namespace eva_attn::cuda::simt
