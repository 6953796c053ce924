// Serves stargz-snapshotter to containerd, for misc/bench/podstart.sh: Debian packages only
// its converter. With the defaults of its library; registries on this machine in plain HTTP.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"google.golang.org/grpc"
)

func main() {
	root := flag.String("root", "", "directory of its state")
	address := flag.String("address", "", "socket to listen on")
	flag.Parse()
	if err := os.MkdirAll(*root, 0o700); err != nil {
		log.Fatal(err)
	}
	snapshotter, err := service.NewStargzSnapshotterService(context.Background(), *root, &service.Config{})
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", *address)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(server.Serve(listener))
}
