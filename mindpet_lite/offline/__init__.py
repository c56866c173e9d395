"""What is done to adapters and bases on the disk, file to file: no net is built, and MindSpore is not used."""
