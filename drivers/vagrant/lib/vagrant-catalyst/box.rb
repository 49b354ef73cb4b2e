# frozen_string_literal: true

require "fileutils"

require "vagrant-catalyst/errors"

module VagrantPlugins
  module Catalyst
    # A box whose copy becomes a VM: the daemon registers a VMX file where it lies, and deletes it with the
    # VM, so each machine has the box's files for itself. Disks are linked where that is possible: the daemon
    # only reads them, and keeps what guests write in files of its own.
    class Box
      # Name of the disk in the copy of a libvirt box.
      DISK = "box.qcow2"
      # Endings of disks.
      DISKS = %w[.vmdk .qcow2 .img].freeze

      # @param [Vagrant::Box] box
      # @param [Pathname] folder of the copy, which is not there yet
      def initialize(box, folder)
        @box = box
        @folder = folder
      end

      # Copies the box.
      #
      # @return [Pathname] the VMX file in the copy
      def copy(name)
        remove
        case @box.provider.to_sym
        when :libvirt then copy_libvirt(name)
        when :vmware_desktop then copy_vmware
        else bad("it is for the provider #{@box.provider}, of which Catalyst knows nothing")
        end
      end

      # Removes the copy.
      def remove
        FileUtils.rm_rf(@folder)
      end

      private

      # Such a box is a VM of VMware's: all of its files, as they are.
      def copy_vmware
        # Of several the first, as AppCatalyst's plugin did.
        found = Dir.glob("*.vmx", base: @box.directory.to_s).min
        bad("it has no .vmx file") if found.nil?
        @folder.mkpath
        @box.directory.children.select(&:file?).each do |file|
          DISKS.include?(file.extname.downcase) ? link(file, file.basename) : FileUtils.cp(file, @folder)
        end
        @folder.join(found)
      end

      # Such a box is a disk; what VM it is for is told here.
      def copy_libvirt(name)
        disk = libvirt_disk
        @folder.mkpath
        link(disk, DISK)
        vmx = @folder.join("box.vmx")
        vmx.write(description(name))
        vmx
      end

      # Another file system has no link to it.
      def link(disk, name)
        FileUtils.ln(disk, @folder.join(name))
      rescue Errno::EXDEV, Errno::EPERM, Errno::EMLINK
        FileUtils.cp(disk, @folder.join(name))
      end

      # `box.img`, or what `disks` of metadata.json names.
      def libvirt_disk
        metadata = @box.metadata || {}
        disks = Array(metadata["disks"])
        bad("it has #{disks.length} disks; Catalyst takes boxes of one") if disks.length > 1
        disk = disks.first || {}
        format = disk["format"] || metadata["format"] || "qcow2"
        bad("its disk is of the format #{format}; Catalyst takes qcow2") if format != "qcow2"
        name = disk["path"] || "box.img"
        bad("its disk #{name.inspect} is not in its folder") if File.basename(name.to_s) != name
        file = @box.directory.join(name)
        bad("its disk #{name} is missing") unless file.file?
        file
      end

      # Of all controllers and cards there are, these are those that most guests have drivers for.
      def description(name)
        {
          ".encoding" => "UTF-8", "config.version" => "8", "virtualHW.version" => "11",
          "displayName" => name, "guestOS" => "other3xlinux-64",
          "sata0.present" => "TRUE", "sata0:0.present" => "TRUE", "sata0:0.fileName" => DISK,
          "ethernet0.present" => "TRUE", "ethernet0.connectionType" => "nat",
          "ethernet0.virtualDev" => "e1000"
        }.map { |key, value| "#{key} = \"#{quoted(value)}\"\n" }.join
      end

      # A quote is written as its number in VMX files, and so is what escapes it.
      def quoted(text)
        text.gsub(/["|[:cntrl:]]/) { |char| format("|%02X", char.ord) }
      end

      def bad(reason)
        raise Errors::BadBox, box: @box.name, reason: reason
      end
    end
  end
end
