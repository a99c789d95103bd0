// The attention operators as functions that Python calls directly. `torch.ops` matches three dozen arguments
// to a schema, which takes longer than all else that the host does in a call.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/eva_attention.h"

namespace eva_attn {
namespace {

template <class Op, class Signature = ForwardSignature<Op>>
struct Direct;
template <class Op, class Results, class... Arguments>
struct Direct<Op, Results(Arguments...)> {
    // By position, in the schema's order; returns the output alone.
    static Tensor call(Arguments... arguments) {
        HANDLE_TH_ERRORS
        const pybind11::gil_scoped_release no_gil;
        return std::get<0>(forward_op<Op>().call(arguments...));
        END_HANDLE_TH_ERRORS_PYBIND
    }
};

} // namespace

PYBIND11_MODULE(_direct, m) {
    m.def("eva_attention", &Direct<EvaAttention>::call);
    m.def("eva_attention_qkvpacked", &Direct<EvaAttentionQkvpacked>::call);
}

} // namespace eva_attn
