// Cuts the work on many layers into pieces, tickets and phases (see tables.h). Plain host code
// without CUDA, so that it is tested on any machine; a plan depends on shapes and settings, never
// on pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "../layer.h"
#include "tables.h"

namespace spectral_ext::cuda {

struct PlanOptions {
  int tickets = 264;              // of a phase, at most: two for each processor of a large device
  int64_t max_columns = 1 << 30;  // rows wider than this or the kernels' own limit count as wide
};

/// One launch: its tables, and the workspace that they refer to.
struct Plan {
  std::vector<LayerTable> layers;
  std::vector<Piece> pieces;
  std::vector<int32_t> tickets;  // the first piece of each; one more at the end
  std::vector<int32_t> phases;   // the first ticket of each; one more at the end
  int64_t workspace_bytes = 0;
};

/// The places of a launch's layers in the tensors of all layers of the call.
struct Places {
  std::vector<int64_t> saved;  // of u in the flat saved vectors, in elements
  std::vector<int32_t> sigma;
};

/// The places of layers whose u, v and σ lie one after the other.
Places consecutive_places(const std::vector<Shape>& shapes);

/// `layers`, at most kMaxLayers, share a dtype. Pointers are not looked at.
Plan plan_forward(const std::vector<Layer>& layers, const Places& places, bool update,
                  const PlanOptions& options = {});
Plan plan_backward(const std::vector<LayerGradient>& layers, const Places& places,
                   const PlanOptions& options = {});

/// Which layers share a launch: those of one dtype, in order, up to kMaxLayers.
std::vector<std::vector<int32_t>> group_layers(const std::vector<DType>& dtypes);

}  // namespace spectral_ext::cuda
