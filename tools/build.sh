# build.sh is read by release.sh and image.sh: how the programs are built so that the same commit gives the same bytes.

# grpcnotrace leaves out gRPC's pages for browsers: they are templates, which may call any method by its name, so that the linker could drop none
# of what is linked. The programs are the same otherwise. [docs/decisions/0052]
tags=grpcnotrace

# build FROM TO VERSION COMMIT ARCH [PROGRAM...]: builds programs of the tree FROM, or of its examples, static, for linux/ARCH, into
# the folder TO.
build() {
	from=$1 to=$2 set="-X github.com/signet-id/signet/internal/version.version=$3 -X github.com/signet-id/signet/internal/version.commit=$4" arch=$5
	shift 5
	for program; do
		folder=cmd
		[ -d "$from/cmd/$program" ] || folder=examples
		(cd "$from" && CGO_ENABLED=0 GOOS=linux GOARCH=$arch GOFLAGS= GOWORK=off go build -tags "$tags" -trimpath -buildvcs=false \
			-ldflags "-s -w -buildid= $set" -o "$to/${program}_linux_$arch" "./$folder/$program")
	done
}

# copy TO: copies what is in the tree, and nothing that git ignores, to a folder that is made.
copy() {
	mkdir -p "$1"
	git ls-files -co --exclude-standard -z | xargs -0 tar cf - | tar xf - -C "$1"
}
