# Options, compiler flags and the functions that the folders' CMakeLists.txt use.
option(BLUEFOG_TESTS "Build the C++ tests" ON)
option(BLUEFOG_BENCHMARKS "Build the C++ benchmarks" ON)
option(BLUEFOG_PYTHON "Build the Python module (needs pybind11)" OFF)
option(BLUEFOG_WERROR "Treat warnings as errors" OFF)
set(BLUEFOG_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined or thread")

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
find_program(BLUEFOG_CCACHE ccache)
if(BLUEFOG_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${BLUEFOG_CCACHE})
endif()

# Contraction off: an FMA happens only where the code says so, so that results do not depend on
# the compiler or the instruction set.
set(BLUEFOG_FLAGS -Wall -Wextra -Wconversion -Wno-sign-conversion -ffp-contract=off)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND BLUEFOG_FLAGS -Wno-restrict)  # GCC 12: false alarms on "literal" + std::string.
endif()
if(BLUEFOG_WERROR)
  list(APPEND BLUEFOG_FLAGS -Werror)
endif()
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  list(APPEND BLUEFOG_FLAGS -Wthread-safety -Werror=thread-safety)
endif()
if(BLUEFOG_SANITIZE)
  add_compile_options(-fsanitize=${BLUEFOG_SANITIZE} -fno-sanitize-recover=all
    -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${BLUEFOG_SANITIZE})
  add_compile_definitions(BLUEFOG_SANITIZED=1)
endif()
# For every executable: what the sanitizers have to know.
function(bluefog_sanitizer_options name)
  if(BLUEFOG_SANITIZE)
    target_sources(${name} PRIVATE ${BLUEFOG_CORE_DIR}/base/sanitizer.cc)
    target_include_directories(${name} PRIVATE ${BLUEFOG_CORE_DIR})
  endif()
endfunction()

set(BLUEFOG_CORE_DIR ${CMAKE_CURRENT_LIST_DIR}/../bluefog_core)

# bluefog_library(name SRCS a.cc … [DEPS …]): one layer of the core, an object library so that every
# self-registering file survives into libbluefog.so and into each test.
function(bluefog_library name)
  cmake_parse_arguments(A "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name} OBJECT ${A_SRCS})
  target_include_directories(${name} PUBLIC
    $<BUILD_INTERFACE:${BLUEFOG_CORE_DIR}> $<BUILD_INTERFACE:${BLUEFOG_CORE_DIR}/include>)
  target_compile_options(${name} PRIVATE ${BLUEFOG_FLAGS})
  target_link_libraries(${name} PUBLIC ${A_DEPS} absl::status absl::statusor Threads::Threads)
endfunction()

# bluefog_component_option(OPTION text): OPTION is AUTO (the default), ON or OFF.
function(bluefog_component_option option text)
  set(${option} AUTO CACHE STRING "${text}: AUTO, ON or OFF")
  set_property(CACHE ${option} PROPERTY STRINGS AUTO ON OFF)
  if(NOT ${option} MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "${option} is '${${option}}' and should be AUTO, ON or OFF")
  endif()
endfunction()

# bluefog_component_choice(OPTION found missing without with): says what AUTO means here, and sets
# OPTION_BUILT; ON that cannot be met is an error.
function(bluefog_component_choice option found missing without with)
  set(${option}_BUILT ${found} PARENT_SCOPE)
  if(NOT found AND ${option} STREQUAL "ON")
    message(FATAL_ERROR "${option}=ON cannot be met: ${missing}")
  elseif(NOT found)
    message(STATUS "${option}=AUTO: off, ${without}: ${missing}")
  elseif(${option} STREQUAL "AUTO")
    message(STATUS "${option}=AUTO: on, with ${with}")
  endif()
endfunction()

# bluefog_component(name): libbluefog_<name>.so of component.cc, which shows what component.map
# names only. The target is bluefog_<name>_component.
function(bluefog_component name)
  set(target bluefog_${name}_component)
  add_library(${target} MODULE component.cc)
  set_target_properties(${target} PROPERTIES
    OUTPUT_NAME bluefog_${name} PREFIX lib LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/component.map)
  target_include_directories(${target} PRIVATE ${BLUEFOG_CORE_DIR} ${BLUEFOG_CORE_DIR}/include)
  target_compile_options(${target} PRIVATE ${BLUEFOG_FLAGS})
  target_link_options(${target} PRIVATE
    -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/component.map)
  include(GNUInstallDirs)
  install(TARGETS ${target} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endfunction()

# bluefog_test(name SRCS x_test.cc … [DEPS target …] [TIMEOUT s] [LABELS …]): a GoogleTest binary.
# DEPS name folders' libraries (bluefog_base …) or bluefog_all for the whole core.
function(bluefog_test name)
  if(NOT BLUEFOG_TESTS)
    return()
  endif()
  cmake_parse_arguments(A "" "TIMEOUT" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 60)
  endif()
  add_executable(${name} ${A_SRCS})
  target_compile_options(${name} PRIVATE ${BLUEFOG_FLAGS} -Wno-conversion)
  target_link_libraries(${name} PRIVATE ${A_DEPS} GTest::gmock GTest::gtest GTest::gtest_main)
  bluefog_sanitizer_options(${name})
  add_test(NAME ${name} COMMAND ${CMAKE_SOURCE_DIR}/ci/with_stacks.sh ${A_TIMEOUT} $<TARGET_FILE:${name}>)
  math(EXPR ctest_timeout "${A_TIMEOUT} + 30")
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ctest_timeout} LABELS "${A_LABELS}")
endfunction()
