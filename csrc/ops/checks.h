// The checks of every op on every device: ValueError for values and shapes, TypeError for dtypes.
#pragma once

#include <c10/core/SymIntArrayRef.h>

#include "ops/call.h"

namespace eva_attn {

SymGeometry make_geometry(c10::SymIntArrayRef grid_size, c10::SymIntArrayRef window_size,
                          c10::SymIntArrayRef chunk_size, c10::SymIntArrayRef overlap,
                          c10::SymIntArrayRef chunk_overlap, c10::SymInt num_prefix_tokens, bool is_causal);

// A packed projection [B, N, 3, H, D].
void check_qkv(const Tensor& qkv);
// query, key, value, geometry, padding mask and scale.
void check_inputs(const Call& call);
void check_summary(const Call& call);
void check_attention(const Call& call);
// Shape, dtype and device of a tensor that a backward op is given.
void check_matches(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape, at::ScalarType dtype,
                   at::Device device);

// float64 for float64, else float32.
at::ScalarType accumulation_dtype(at::ScalarType dtype);

// [B, H, N, D] in [B, N, H, D] memory, like `query`.
Tensor empty_tokens(const Tensor& query);
// Contiguous, on the query's device.
Tensor empty_beside(const Tensor& query, c10::SymIntArrayRef shape, at::ScalarType dtype);
// Shaped like the tensor and contiguous; [0] where there is none.
Tensor empty_gradient(const Tensor& query, const OptionalTensor& tensor);
Tensors<8> empty_weight_gradients(const Call& call);

Geometry concrete(const SymGeometry& geometry);

} // namespace eva_attn
