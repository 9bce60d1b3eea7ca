#include "core.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled methods of pyseg-classical; their modules in Python check and explain.";
  classical::bind_clustering(m);
  classical::bind_growing(m);
  classical::bind_split_merge(m);
  classical::bind_flow(m);
  classical::bind_cuts(m);
  classical::bind_graphs(m);
  classical::bind_matching(m);
}
