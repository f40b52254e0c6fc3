#!/usr/bin/env bash
# Debian's packages prometheus (server, promtool) and prometheus-pushgateway, for the tests that need the real ones.
# Does nothing where they are there.
set -euo pipefail
command -v prometheus >/dev/null && command -v promtool >/dev/null && command -v prometheus-pushgateway >/dev/null && exit 0
sudo=""
[ "$(id -u)" -eq 0 ] || sudo="sudo"
$sudo apt-get update -qq
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends prometheus prometheus-pushgateway >/dev/null
