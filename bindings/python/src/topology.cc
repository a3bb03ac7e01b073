// Topology, TopologySequence, the generators and the analysis for Python.
#include <bluefog/topology.h>

#include <cmath>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "communicator.h"
#include "support.h"

namespace bluefog::python {
namespace {

using Matrix = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::string ShapeOf(const Matrix& matrix) { return py::str(py::object(matrix.attr("shape"))); }

Topology FromMatrix(const Matrix& matrix, const std::string& name) {
  if (matrix.ndim() != 2 || matrix.shape(0) != matrix.shape(1) || matrix.shape(0) == 0) {
    Throw(absl::InvalidArgumentError("a topology's matrix must be n x n with n >= 1; this one is " +
                                     ShapeOf(matrix)));
  }
  const std::vector<double> weights(matrix.data(), matrix.data() + matrix.size());
  return ValueOrThrow(Topology::FromMatrix(static_cast<int>(matrix.shape(0)), weights, name));
}

using Edges = std::vector<std::tuple<int, int, double>>;

Topology FromEdges(int n, const Edges& edges, const std::string& name) {
  std::vector<Topology::WeightedEdge> list;
  list.reserve(edges.size());
  for (const auto& [from, to, weight] : edges) list.push_back({from, to, weight});
  return ValueOrThrow(Topology::FromEdges(n, list, name));
}

Edges ToEdges(const Topology& topology) {
  Edges edges;
  for (int i = 0; i < topology.size(); ++i) {
    const Neighborhood& ranks = topology.neighborhood(i);
    edges.emplace_back(i, i, ranks.self_weight);
    for (const Edge& edge : ranks.out) edges.emplace_back(i, edge.rank, edge.weight);
  }
  return edges;
}

py::array ToMatrix(const Topology& topology) {
  const std::vector<double> weights = topology.ToMatrix();
  const py::ssize_t n = topology.size();
  return py::array_t<double>({n, n}, weights.data());
}

const Neighborhood& NeighborhoodOf(const Topology& topology, int rank) {
  if (rank < 0 || rank >= topology.size()) {
    Throw(absl::InvalidArgumentError("rank " + std::to_string(rank) + " is not in 0.." +
                                     std::to_string(topology.size() - 1)));
  }
  return topology.neighborhood(rank);
}

py::dict ToDict(const std::vector<Edge>& edges) {
  py::dict result;
  for (const Edge& edge : edges) result[py::int_(edge.rank)] = edge.weight;
  return result;
}

TopologyAnalysis AnalyzeWithoutGil(const TopologySequence& topology) {
  const py::gil_scoped_release release;
  return Analyze(topology);
}

std::string Print(const TopologyAnalysis& a) {
  std::ostringstream out;
  out << std::boolalpha << "TopologyAnalysis(symmetric=" << a.symmetric
      << ", doubly_stochastic=" << a.doubly_stochastic << ", connected=" << a.connected
      << ", spectrum_known=" << a.spectrum_known << ", lambda2=" << a.lambda2
      << ", lambda_min=" << a.lambda_min << ", spectral_gap=" << a.spectral_gap
      << ", exact_average=" << a.exact_average << ", max_in_degree=" << a.max_in_degree
      << ", max_out_degree=" << a.max_out_degree << ", messages_per_step=" << a.messages_per_step
      << ", problem='" << a.problem << "')";
  return out.str();
}

std::string Print(const Topology& t) {
  return "<Topology '" + t.name() + "' of " + std::to_string(t.size()) + " ranks>";
}

std::string Print(const TopologySequence& t) {
  return "<TopologySequence '" + t.name() + "' of " + std::to_string(t.size()) + " ranks, period " +
         std::to_string(t.period()) + ">";
}

void BindAnalysis(py::module_& module) {
  // Not computed for large graphs: then nobody shall take a 0 for an answer.
  const auto spectral = [](double TopologyAnalysis::*value) {
    return [value](const TopologyAnalysis& a) { return a.spectrum_known ? a.*value : NAN; };
  };
  py::class_<TopologyAnalysis>(
      module, "TopologyAnalysis",
      "What can be said about a graph; over a whole period for a sequence.")
      .def_readonly("symmetric", &TopologyAnalysis::symmetric,
                    "W = W^T within 1e-9, in every round.")
      .def_readonly("asymmetry", &TopologyAnalysis::asymmetry,
                    "The first pair with W[i, j] != W[j, i] in words, or empty.")
      .def_readonly("doubly_stochastic", &TopologyAnalysis::doubly_stochastic,
                    "Rows and columns sum to 1 within 1e-9, in every round.")
      .def_readonly("column_stochastic", &TopologyAnalysis::column_stochastic,
                    "What each rank combines sums to 1: constants are kept.")
      .def_readonly("row_stochastic", &TopologyAnalysis::row_stochastic,
                    "What each rank gives away sums to 1: the mean is kept.")
      .def_readonly("connected", &TopologyAnalysis::connected,
                    "Strongly connected, by the edges of one period together.")
      .def_readonly("cut", &TopologyAnalysis::cut,
                    "Between which ranks there is no path, in words; or empty.")
      .def_readonly("spectrum_known", &TopologyAnalysis::spectrum_known,
                    "False for more than 256 ranks: the next four are then nan and False.")
      .def_property_readonly("lambda2", spectral(&TopologyAnalysis::lambda2),
                             "Second largest eigenvalue of a symmetric W; of a directed one the "
                             "second largest modulus; of a sequence that of the product over a "
                             "period, per round. 0 for one rank.")
      .def_property_readonly("lambda_min", spectral(&TopologyAnalysis::lambda_min),
                             "Smallest eigenvalue (real part) of any round.")
      .def_property_readonly("spectral_gap", spectral(&TopologyAnalysis::spectral_gap),
                             "1 - the largest modulus but the first, per round.")
      .def_readonly("exact_average", &TopologyAnalysis::exact_average,
                    "After one period every rank holds the mean, to 1e-12.")
      .def_readonly("max_in_degree", &TopologyAnalysis::max_in_degree,
                    "Most sources of a rank in one round, without itself.")
      .def_readonly("max_out_degree", &TopologyAnalysis::max_out_degree,
                    "Most destinations of a rank in one round, without itself.")
      .def_readonly("messages_per_step", &TopologyAnalysis::messages_per_step,
                    "Sent by the busiest rank, mean over a period.")
      .def_readonly("problem", &TopologyAnalysis::problem,
                    "The first sum that is not 1, or the first rank cut off, in words; or empty.")
      .def("__repr__", [](const TopologyAnalysis& a) { return Print(a); });
}

void BindClasses(py::module_& module) {
  py::class_<Topology>(module, "Topology",
                       "An immutable weighted directed graph over ranks 0 … size-1.")
      .def_property_readonly("size", &Topology::size, "Number of ranks.")
      .def_property_readonly("name", &Topology::name, "For messages and pictures.")
      .def("to_matrix", &ToMatrix,
           "W as float64[n, n]; W[i, j] is the weight on the edge i -> j, the diagonal what each "
           "rank keeps of its own.")
      .def(
          "weight",
          [](const Topology& t, int from, int to) {
            NeighborhoodOf(t, from);
            NeighborhoodOf(t, to);
            return t.weight(from, to);
          },
          py::arg("from_rank"), py::arg("to_rank"), "Weight on one edge; 0.0 where there is none.")
      .def(
          "self_weight",
          [](const Topology& t, int rank) { return NeighborhoodOf(t, rank).self_weight; },
          py::arg("rank"), "What `rank` keeps of its own vector.")
      .def(
          "in_neighbors",
          [](const Topology& t, int rank) { return ToDict(NeighborhoodOf(t, rank).in); },
          py::arg("rank"), "{source: weight}, ascending, without the rank itself.")
      .def(
          "out_neighbors",
          [](const Topology& t, int rank) { return ToDict(NeighborhoodOf(t, rank).out); },
          py::arg("rank"), "{destination: weight}, ascending, without the rank itself.")
      .def(
          "analyze", [](const Topology& t) { return AnalyzeWithoutGil(TopologySequence(t)); },
          "Symmetry, stochasticity, connectivity and spectrum, as a TopologyAnalysis.")
      .def("__len__", &Topology::size)
      .def(
          "__eq__", [](const Topology& a, const Topology& b) { return a == b; }, py::is_operator())
      .def("__repr__", [](const Topology& t) { return Print(t); })
      .def(py::pickle(
          [](const Topology& t) { return py::make_tuple(t.size(), ToEdges(t), t.name()); },
          [](const py::tuple& state) {
            return FromEdges(state[0].cast<int>(), state[1].cast<Edges>(),
                             state[2].cast<std::string>());
          }))
      .attr("__hash__") = py::none();

  py::class_<TopologySequence, std::shared_ptr<TopologySequence>>(
      module, "TopologySequence", "Round -> Topology, repeating with a period.")
      .def(py::init([](const std::vector<Topology>& rounds, const std::string& name) {
             return std::make_shared<TopologySequence>(
                 ValueOrThrow(TopologySequence::Of(rounds, name)));
           }),
           py::arg("rounds"), py::arg("name") = "custom")
      .def_property_readonly("size", &TopologySequence::size, "Number of ranks.")
      .def_property_readonly("period", &TopologySequence::period, "Rounds until it repeats.")
      .def_property_readonly("is_static", &TopologySequence::is_static, "A period of one round.")
      .def_property_readonly("name", &TopologySequence::name, "For messages and pictures.")
      .def(
          "at",
          [](const TopologySequence& t, int64_t round) {
            if (round < 0) {
              Throw(absl::InvalidArgumentError("round " + std::to_string(round) + " is negative"));
            }
            return t.at(round);
          },
          py::arg("round"), "The Topology of a round (>= 0).")
      .def(
          "to_matrix",
          [](const TopologySequence& t, int64_t round) { return ToMatrix(t.at(round)); },
          py::arg("round") = 0, "W of a round as float64[n, n].")
      .def("analyze", &AnalyzeWithoutGil,
           "Symmetry, stochasticity, connectivity and spectrum over a period, as a "
           "TopologyAnalysis.")
      .def(
          "__eq__",
          [](const TopologySequence& a, const TopologySequence& b) {
            bool equal = a.period() == b.period();
            for (int r = 0; equal && r < a.period(); ++r) equal = a.at(r) == b.at(r);
            return equal;
          },
          py::is_operator())
      .def("__repr__", [](const TopologySequence& t) { return Print(t); })
      .def(py::pickle(
          [](const TopologySequence& t) {
            py::list rounds;
            for (int r = 0; r < t.period(); ++r) rounds.append(t.at(r));
            return py::make_tuple(rounds, t.name());
          },
          [](const py::tuple& state) {
            return std::make_shared<TopologySequence>(ValueOrThrow(TopologySequence::Of(
                state[0].cast<std::vector<Topology>>(), state[1].cast<std::string>())));
          }))
      .attr("__hash__") = py::none();
}

}  // namespace

void BindTopology(py::module_& module) {
  BindAnalysis(module);
  BindClasses(module);
  module.def("topology_from_matrix", &FromMatrix);
  module.def("topology_from_edges", &FromEdges);
  module.def("as_sequence", [](const Topology& t) { return TopologySequence(t); });
  module.def("topology_names", [] {
    std::vector<std::string> names;
    for (const TopologyGenerator& generator : TopologyGenerators()) names.push_back(generator.name);
    return names;
  });
  module.def("make_topology",
             [](const std::string& name, int n) { return ValueOrThrow(MakeTopology(name, n)); });
  module.def("metropolis_hastings", [](const Adjacency& neighbors, const std::string& name) {
    return ValueOrThrow(MetropolisHastings(neighbors, name));
  });
  module.def("uniform_weights", [](const Adjacency& neighbors, const std::string& name) {
    return ValueOrThrow(UniformWeights(neighbors, name));
  });
  module.def("exponential", [](int n, int base) { return ValueOrThrow(Exponential(n, base)); });
  module.def("symmetric_exponential",
             [](int n, int base) { return ValueOrThrow(SymmetricExponential(n, base)); });
  module.def("ring", [](int n, int style) {
    if (style < 0 || style > 2) {
      Throw(
          absl::InvalidArgumentError("ring style " + std::to_string(style) + " is not 0, 1 or 2"));
    }
    return ValueOrThrow(Ring(n, static_cast<RingStyle>(style)));
  });
  module.def("star", [](int n, int center) { return ValueOrThrow(Star(n, center)); });
  module.def("mesh_grid_2d", [](int n, int rows) { return ValueOrThrow(MeshGrid2D(n, rows)); });
  module.def("torus_2d", [](int n, int rows) { return ValueOrThrow(Torus2D(n, rows)); });
  module.def("hypercube", [](int n) { return ValueOrThrow(Hypercube(n)); });
  module.def("fully_connected", [](int n) { return ValueOrThrow(FullyConnected(n)); });
  module.def("erdos_renyi",
             [](int n, double p, uint64_t seed) { return ValueOrThrow(ErdosRenyi(n, p, seed)); });
  module.def("one_peer_exponential", [](int n) { return ValueOrThrow(OnePeerExponential(n)); });
  module.def("one_peer_hypercube", [](int n) { return ValueOrThrow(OnePeerHypercube(n)); });
}

}  // namespace bluefog::python
