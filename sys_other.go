//go:build !linux

// This file stands in for sys_linux.go on other Unix systems (darwin): a command and its process group are ended.
// It may call the kernel directly, like its siblings.
// It must not pretend: what escapes the group (setsid) lives on here, rlimits are refused, and the README says so.
package main

import (
	"os"
	"syscall"
)

const setPipeSize, bytesWaiting = -1, 0x4004667f // no such call; FIONREAD

func adoptOrphans() error                                 { return nil }
func hideProcess() error                                  { return nil }
func childAttributes() *syscall.SysProcAttr               { return &syscall.SysProcAttr{Setsid: true} }
func ownBinary() string                                   { path, _ := os.Executable(); return path }
func setTag(runTag) error                                 { return nil }
func tagOf(int) (runTag, bool)                            { return untagged, true }
func prepareSpawner(bool)                                 {}
func pidfd(int) int                                       { return -1 }
func startsAtOnce(path string) (string, bool)             { return path, true }
func statChangeTime(st *syscall.Stat_t) (sec, nsec int64) { return st.Ctimespec.Unix() }
