#!/usr/bin/env bash
# Debian's prometheus package (server and promtool) for the tests that need the real one. Does nothing where it is there.
set -euo pipefail
command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0
sudo=""
[ "$(id -u)" -eq 0 ] || sudo="sudo"
$sudo apt-get update -qq
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends prometheus >/dev/null
