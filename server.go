// This file is the HTTP side: listener, gates in order, routes, documents, and every answer.
// It may listen and write to the network, and it alone.
// It must not decide or run anything itself: it asks acl.go, records in audit.go, runs through exec.go.
package main

import (
	"context"
	"log"
	"net"
)

// server is one listening aexec.
type server struct {
	start   startup
	store   *store
	audit   *auditLog
	runner  *runner
	plugins []*plugin // loaded and valid; snapshot.disabled says which are off now
	log     *log.Logger
	address string // what it listens on, host:port
}

// listen binds host:port (port 0: any free one). The error says what to do (port taken: by whom to look).
func listen(host string, port int) (net.Listener, error) { panic("server") }

// serve answers on l until ctx ends, then shuts down: accepts nothing new, ends running commands, answers them, returns when all are answered.
func (s *server) serve(ctx context.Context, l net.Listener) error { panic("server") }

// frontmatter reads the name and one-line description at the head of a SKILL.md (Agent Skills); the error says what is wrong with it.
func frontmatter(doc []byte) (name, description string, err error) { panic("server") }
