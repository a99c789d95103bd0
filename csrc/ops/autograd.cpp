#include "ops/autograd.h"

#include <torch/library.h>

#include "ops/chunk_summary.h"
#include "ops/eva_attention.h"
#include "ops/window_attention.h"

namespace eva_attn {
namespace {

template <class Op>
void implement(torch::Library& m, const char* name, const char* backward_name) {
    m.impl(name, &AutogradForward<Op>::call);
    m.impl(backward_name, &AutogradBackward<Op>::call);
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, Autograd, m) {
    implement<EvaAttention>(m, "eva_attention", "eva_attention_backward");
    implement<EvaAttentionQkvpacked>(m, "eva_attention_qkvpacked", "eva_attention_qkvpacked_backward");
    implement<ChunkSummary>(m, "chunk_summary", "chunk_summary_backward");
    implement<WindowAttention>(m, "window_attention", "window_attention_backward");
}

} // namespace eva_attn
