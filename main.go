// This file is the entry: version, dispatch, wiring, signals.
// It may end the process, and it alone.
// It must not hold logic that another room could: it reads straight down.
package main

const version = "v0.1.0"

func main() {}
