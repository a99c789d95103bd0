#include "ops/decode_step.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <cmath>

#include "cpu/support.h"

namespace eva_attn::cpu {
namespace {

// Refuses a sequence that would outgrow the landmarks; whether a chunk ends among the new tokens.
bool ends_a_chunk(const DecodeParams& p) {
    bool ends = false;
    for (int64_t i = 0; i < p.batch * p.heads; ++i) {
        const int64_t count = p.num_tokens ? p.num_tokens[i / p.heads] : p.tokens;
        TORCH_CHECK_VALUE(0 <= count && count <= p.tokens, "num_tokens must be between 0 and ", p.tokens,
                          ", got ", count);
        const int64_t begin = p.position[i], most = p.num_landmarks * p.chunk_size;
        TORCH_CHECK_VALUE(0 <= begin && begin <= most - count, "head_position must be between 0 and ", most,
                          ", as ", p.num_landmarks, " landmarks allow, for ", count,
                          " new tokens as well, got ", begin);
        ends |= begin / p.chunk_size != (begin + count) / p.chunk_size;
    }
    return ends;
}

void forward(const DecodeCall& decode, const Tensor& output) {
    const auto& [call, state, num_tokens, log_count_bias] = decode;
    const auto size = [](const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); };
    const auto accumulation = state.key_sum.scalar_type();
    const Tensor counts = contiguous(num_tokens, at::kLong);
    const Tensor bias = contiguous(call.attention.relative_bias, accumulation);
    DecodeParams params{
        .batch = call.query.size(0),
        .heads = call.query.size(1),
        .tokens = call.query.size(2),
        .head_dim = call.query.size(3),
        .window_size = size(call.geometry.window_width),
        .overlap = size(call.geometry.overlap_x),
        .chunk_size = size(call.geometry.chunk_width),
        .num_landmarks = state.landmark_key.size(2),
        .query = rows(call.query),
        .key = rows(call.key),
        .value = rows(call.value),
        .num_tokens = counts.defined() ? counts.const_data_ptr<int64_t>() : nullptr,
        .window_key = data(state.window_key),
        .window_value = data(state.window_value),
        .landmark_key = data(state.landmark_key),
        .landmark_value = data(state.landmark_value),
        .key_sum = data(state.key_sum),
        .query_sum = data(state.query_sum),
        .position = state.head_position.mutable_data_ptr<int64_t>(),
        .key_projection = {},
        .query_projection = {},
        .has_projection = call.summary.key.weight.has_value(),
        .has_query_projection = call.summary.query.weight.has_value(),
        .norm_eps = call.summary.norm_eps,
        .scale = scale_of(call),
        .relative_bias = data(bias),
        .relative_bias_head_stride = bias.defined() && bias.size(0) > 1 ? bias.stride(0) : 0,
        .landmark_bias = 0,
        .landmark_entropy = state.landmark_entropy ? data(*state.landmark_entropy) : nullptr,
        .exclude_window_landmarks = call.attention.exclude_window_landmarks,
        .output = rows(output),
    };
    if (log_count_bias) params.landmark_bias = std::log(static_cast<double>(params.chunk_size));

    ProjectionTensors key_projection, query_projection;
    if (ends_a_chunk(params)) {
        key_projection = projection_tensors(call.summary.key, accumulation);
        query_projection = projection_tensors(call.summary.query, accumulation);
        params.key_projection = projection(key_projection);
        params.query_projection = projection(query_projection);
    }

    const Kernels& kernels = kernels_for(call.query.scalar_type());
    const size_t scratch_size = kernels.decode_scratch(params);
    at::parallel_for(0, params.batch * params.heads, 1, [&](int64_t begin, int64_t end) {
        const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_size);
        kernels.decode_step(params, begin, end, static_cast<char*>(scratch.get()));
    });
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CPU, m) { m.impl("decode_step", &DecodeStepBackend<forward>::forward); }

} // namespace eva_attn::cpu
